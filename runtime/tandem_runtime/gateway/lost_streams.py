"""Streams of gateways that were lost, found again on their pods."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from tandem_runtime.frontend.backend import Route, ServedModel
from tandem_runtime.frontend.errors import Unavailable
from tandem_runtime.gateway.backend import GatewayBackend
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.fleets import Fleets
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, HeldStream

log = logging.getLogger(__name__)

_AT_ONCE: Final = 64
"""Pods that are asked at the same time, for all clients together."""


@dataclass(frozen=True)
class _Found:
    model: ServedModel
    pod: PodView
    stream: HeldStream
    backend: GatewayBackend

    def generate(
        self, model: ServedModel, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        return self.backend.take_over(model, self.pod, self.stream, route)


class LostStreams:
    def __init__(
        self,
        discovery: Discovery,
        client: PodClient,
        fleets: Fleets,
        backend: GatewayBackend,
        metrics: GatewayMetrics,
    ) -> None:
        self._discovery = discovery
        self._client = client
        self._fleets = fleets
        self._backend = backend
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self.resumption_ended = metrics.resumption_ended
        self.generate = backend.generate

    async def held(self, answer: str, tenant: str) -> list[_Found]:
        """All of them, each on the pod that has its newest attempt. Raises `Unavailable`."""
        pods = [pod for pod in self._discovery.pods if pod.decodes and pod.ip]
        answers = await asyncio.gather(*(self._ask(pod, answer) for pod in pods))
        newest: dict[str, tuple[PodView, HeldStream]] = {}
        for pod, streams in zip(pods, answers, strict=True):
            for stream in streams:
                request = stream.request
                known = newest.get(request.stream_id)
                older = known is None or known[1].request.epoch < request.epoch
                if request.tenant == tenant and older:
                    newest[request.stream_id] = (pod, stream)
        try:
            return [
                _Found(await self._fleets.model_of(pod), pod, stream, self._backend)
                for pod, stream in newest.values()
            ]
        except PodUnreachable as error:
            raise Unavailable(f"The stream's pod gave no tokenizer: {error}.") from None

    async def _ask(self, pod: PodView, answer: str) -> tuple[HeldStream, ...]:
        async with self._turns:
            try:
                return await self._client.held(pod, answer)
            except PodUnreachable as error:
                log.debug("pod %s was not asked for a lost stream: %s", pod.name, error)
                return ()
