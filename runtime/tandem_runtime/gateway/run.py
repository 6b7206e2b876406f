"""The gateway's life: listen, watch, serve, finish its streams, end."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Final

from kubernetes.aio.config import ConfigException
from prometheus_client import CollectorRegistry

from tandem_runtime.frontend.oip.grpc import bind, create_server
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.frontend.oip.statistics import Statistics
from tandem_runtime.frontend.process import BadConfig, stop_signal
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.server import HttpServer
from tandem_runtime.gateway.api import create_gateway_app
from tandem_runtime.gateway.backend import GatewayBackend
from tandem_runtime.gateway.context_meter import ContextMeter
from tandem_runtime.gateway.contexts import GatewayContexts
from tandem_runtime.gateway.discovery import Discovery, PodWatch, api_client
from tandem_runtime.gateway.fleets import Fleets
from tandem_runtime.gateway.health import PodHealth
from tandem_runtime.gateway.load import Loads
from tandem_runtime.gateway.lost_streams import LostStreams
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.page_watch import PageWatch
from tandem_runtime.gateway.pod_client import PodClient

log = logging.getLogger(__name__)

_LINGER_S: Final = 2.0
"""After SIGTERM new requests are still served for so long: load balancers take time to notice."""
_FOREVER_S: Final = 1e6
_IDLE_CALLS_S: Final = 2.0
"""Open gRPC calls are ended so long after the last stream: a client may hold one for ever."""


class Gateway:
    """The parts put together, over any discovery."""

    def __init__(self, options: GatewayOptions, discovery: Discovery) -> None:
        self._options = options
        self._discovery = discovery
        self.loops: list[asyncio.Task[None]] = []
        """Never to end by themselves."""
        registry = CollectorRegistry()
        metrics = GatewayMetrics(registry)
        statistics = Statistics()
        self._client = PodClient(options.secret)
        loads = Loads()
        self._health = PodHealth(discovery, self._client, loads)
        self._fleets = Fleets(discovery, self._client, self._health)
        self.pages = PageWatch(discovery, self._client)
        contexts = GatewayContexts(discovery, self._client, self._health, ContextMeter(registry))
        self.backend = GatewayBackend(
            discovery,
            self._fleets,
            self._client,
            self._health,
            loads,
            metrics,
            options.secret,
            contexts,
            self.pages.held,
            resume=options.resume,
        )
        metrics.watch(
            lambda: self.backend.streams, lambda: discovery.age_s, lambda: self.pages.held.pages
        )

        def observe(record: StreamRecord) -> None:
            metrics.observe(record)
            contexts.observe(record)
            statistics.observe(record)

        inference = InferenceService(self.backend, statistics, observe)
        self._grpc = create_server(inference)
        self._http = HttpServer(options.host, options.port)
        self._http.app = create_gateway_app(
            options,
            self.backend,
            inference,
            discovery,
            metrics,
            self._fleets.waking,
            LostStreams(discovery, self._client, self._fleets, self.backend, metrics),
            registry,
        )

    async def start(self) -> tuple[int, int]:
        """The HTTP and the gRPC port. Raises OSError."""
        self.loops += [
            asyncio.create_task(self._health.run(), name="the health checks"),
            asyncio.create_task(self._fleets.run(), name="the fetching of tokenizers"),
            asyncio.create_task(self.pages.run(), name="the reading of pods' pages"),
            asyncio.create_task(self.backend.contexts.run(), name="the rounds over contexts"),
        ]
        if self._options.migrate:
            moves = self.backend.moves.run()
            self.loops.append(asyncio.create_task(moves, name="the look-out for pods that drain"))
        port = await self._http.start()
        grpc_port = bind(self._grpc, self._options.host, self._options.grpc_port)
        await self._grpc.start()
        return port, grpc_port

    async def stop(self) -> None:
        """Not ready at once, admits nothing after the linger, ends when the last stream has."""
        self.backend.leaving = True
        self._http.closing = True
        await asyncio.sleep(_LINGER_S)
        self.backend.closed = self._fleets.waking.closed = True
        # gRPC's GOAWAY: calls that run go on, new ones go elsewhere.
        ending_calls = asyncio.create_task(self._grpc.stop(_FOREVER_S))
        while self.backend.streams or self._fleets.waking.held:  # noqa: ASYNC110 - streams end in many places
            await asyncio.sleep(0.05)
        await self._grpc.stop(_IDLE_CALLS_S)
        await ending_calls
        await self._http.stop()
        for loop in self.loops:
            loop.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)
        await self._client.close()


async def run(options: GatewayOptions) -> int:
    """The exit status."""
    asked_to_stop = stop_signal()
    try:
        api = await api_client(options.kubeconfig)
    except ConfigException as error:
        raise BadConfig(f"no way to the Kubernetes API: {error}") from error
    watch = PodWatch(api, options.namespace)
    watching = asyncio.create_task(watch.run(), name="the watch of pods")
    gateway = Gateway(options, watch)
    await gateway.start()
    # Modules live as long as the process: while the collector walks them, no stream goes on.
    gc.collect()
    gc.freeze()
    log.info("namespace %s: listening on %s:%d", options.namespace, options.host, options.port)
    stopping = asyncio.ensure_future(asked_to_stop.wait())
    loops = {watching, *gateway.loops}
    await asyncio.wait({stopping, *loops}, return_when=asyncio.FIRST_COMPLETED)
    ended = [loop for loop in loops if loop.done()]
    for loop in ended:
        log.error("%s ended, so the gateway ends too: %r", loop.get_name(), loop.exception())
    await gateway.stop()
    stopping.cancel()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await api.close()
    return 1 if ended else 0
