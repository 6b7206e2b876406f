"""A serving pod put together: engine, handoff, streams, front end; and how it empties."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry

from tandem_runtime.contract import KV_PAGE_TOKENS, Role
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.frontend.backend import ModelCard, ServedModel
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.exporter import Exporter, ExportStreams, Refusal
from tandem_runtime.kv.handoff.handshake import Identity
from tandem_runtime.kv.handoff.importer import Importer
from tandem_runtime.page_events import PageEvents
from tandem_runtime.protocol import DrainRequest, PodState, PodWork, TokenizerBundle
from tandem_runtime.serve.backend import LocalBackend
from tandem_runtime.serve.context_files import ContextFiles
from tandem_runtime.serve.context_metrics import ContextCollector
from tandem_runtime.serve.contexts import PodContexts
from tandem_runtime.serve.device import DeviceCollector, DeviceWatch
from tandem_runtime.serve.keeper import KvKeeper
from tandem_runtime.serve.kept import KeptStreams
from tandem_runtime.serve.lender import Lender
from tandem_runtime.serve.lifecycle import Lifecycle
from tandem_runtime.serve.metrics import EngineCollector, KeptCollector, PodMetrics
from tandem_runtime.serve.options import ServeOptions
from tandem_runtime.serve.streams import StreamService
from tandem_runtime.serve.worker import EngineWorker

log = logging.getLogger(__name__)

_PAGES_LOOK_S: Final = 0.05
"""Changes within this time go out together."""
_PAGES_LOOKS: Final = 20


class Pod:
    """Around an engine that `worker` runs already."""

    def __init__(
        self, options: ServeOptions, worker: EngineWorker, engine: Engine, bundle: TokenizerBundle
    ) -> None:
        self.options = options
        self.worker = worker
        self.bundle = bundle
        self.lifecycle = Lifecycle()
        probe = engine.probe
        self.devices = DeviceWatch(probe)
        if probe is not None:
            worker.after_step(lambda *_: probe.run_if_due())
        self.registry = CollectorRegistry()
        self.registry.register(DeviceCollector(options.model_name, self.devices))
        self.exporter: Exporter | None = None
        self.importer: Importer | None = None
        self._pages = engine.pages
        self._tiers = engine.tiers
        self.lender = Lender(engine, lends=options.engine.peer_tier)
        self._capacity_tokens = engine.kv_capacity_tokens
        self._step_tokens, self._max_streams = engine.max_batch_tokens, engine.max_running
        self._started_unix_s = time.time()
        self._deadline: asyncio.TimerHandle | None = None
        metrics = PodMetrics(self.registry, options.model_name)
        engine.observe_loading(metrics.observe_loading)
        identity = _identity(options, engine)
        grammars = Grammars(bundle.tokenizer_json, engine.vocab_size, bundle.eos_token_ids)
        if options.role is Role.PREFILL:
            self.exporter = Exporter(worker, identity, grammars, self._refuse_export)
        elif options.secret:
            self.exporter = Exporter(
                worker,
                identity,
                grammars,
                lambda: Refusal("bad_request", "this pod computes no prompts for others"),
                find=lambda stream_id, epoch: self.streams.find(stream_id, epoch),
                on_moved=metrics.observe_pause,
            )
            self.importer = Importer(worker, identity, on_handoff=metrics.observe_handoff)
        self.registry.register(
            EngineCollector(
                options.model_name,
                worker,
                engine.block_tokens,
                self.exporter,
                self.importer,
                engine.tiers,
                self.lender,
            )
        )
        self.streams = StreamService(
            worker,
            self.importer,
            grammars,
            self.lifecycle,
            model=options.model_name,
            max_waiting=options.max_waiting,
            observe=metrics.observe,
            observe_gap=metrics.observe_gap,
        )
        self.kept = KeptStreams(self.streams, options.hold_s)
        self.registry.register(KeptCollector(options.model_name, self.kept))
        models = [self._served(name) for name in options.served_names]
        disk = options.engine.disk_tier_dir
        files = None if disk is None else ContextFiles(Path(disk))
        self.contexts = PodContexts(KvKeeper(worker, engine), models[0], files)
        self._keeping: asyncio.Task[None] | None = None
        self.registry.register(ContextCollector(options.model_name, self.contexts))
        self.backend = LocalBackend(
            options.pod, options.role, models, self.streams, self.lifecycle, self.contexts
        )

    async def open(self) -> None:
        """Keeps contexts, listens for pods that want KV of this one, and watches the devices."""
        await self.keep_contexts()
        if self.options.engine.device == "cuda":
            self.devices.start()
        if self.exporter is not None:
            await self.exporter.listen(self.options.host, self.options.handoff_port)

    async def keep_contexts(self) -> None:
        """From now on, until it is closed."""
        await self.contexts.load()
        self._keeping = asyncio.create_task(self.contexts.run(), name="the keeping of contexts")

    async def page_events(self, log: str, seq: int) -> PageEvents:
        """What changed of the pages that the accelerator holds; answers a moment after something
        did, or with nothing once that took too long."""
        for _ in range(_PAGES_LOOKS):
            if log != self._pages.id or seq != self._pages.seq:
                break
            await asyncio.sleep(_PAGES_LOOK_S)
        events = self._pages.since(log, seq)
        if self._tiers is None:
            return events
        below, percent = self._tiers.keeps_below, self._tiers.peer_percent
        return msgspec.structs.replace(events, tiers_below=below, peer_percent=percent)

    async def close(self) -> None:
        """Ends what still runs."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.kept.close()
        await asyncio.to_thread(self.devices.stop)
        for end in (self.exporter, self.importer):
            if end is not None:
                await end.close()
        await self.worker.stop()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread lives and its steps end."""
        stuck = self.worker.silent_s > self.options.watchdog_s
        return not stuck and not self.worker.failed.done()

    @property
    def ready(self) -> bool:
        return self.healthy and self.lifecycle.ready(self.state().in_flight)

    def state(self) -> PodState:
        stats = self.worker.stats
        exports = ExportStreams(0, 0, 0) if self.exporter is None else self.exporter.streams
        return PodState(
            pod=self.options.pod,
            role=self.options.role.value,
            revision=self.options.revision,
            model=self.options.model_name,
            ready=self.healthy and self.lifecycle.admits,
            draining=not self.lifecycle.admits,
            running=self.streams.running + exports.computing,
            waiting=self.streams.waiting + exports.queued,
            exporting=exports.held,
            kv_usage=0.0 if stats is None else stats.kv_usage,
            kv_capacity_tokens=self._capacity_tokens,
            started_unix_s=self._started_unix_s,
            context_tokens=self.bundle.context_tokens,
            work=self._work(),
            device=self.devices.report(),
            pace=self.options.engine.stated_name,
        )

    def _work(self) -> PodWork | None:
        stats = self.worker.stats
        if stats is None:
            return None
        return PodWork(
            requests=stats.arrivals,
            prompt_tokens=stats.prompt_tokens - stats.cached_tokens,
            output_tokens=stats.generated_tokens,
            steps=self.worker.step_times.sums,
            queued_tokens=stats.queued_tokens,
            kv_tokens=round(stats.kv_usage * self._capacity_tokens),
            step_tokens=self._step_tokens,
            max_streams=self._max_streams,
        )

    def drain(self, request: DrainRequest) -> None:
        """Idempotent; a later request replaces an earlier one's deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if request.mode == "cancel":
            self.lifecycle.undo_drain()
            return
        self.lifecycle.drain()
        if request.mode == "end":
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(request.deadline_s or 0.0, self._end_streams)

    async def empty(self) -> None:
        """Waits until no stream is left."""
        while self.state().in_flight:  # noqa: ASYNC110 - streams end in many places
            await asyncio.sleep(0.05)

    def _end_streams(self) -> None:
        reason = "this pod ends its streams"
        self.streams.end_all("draining", reason)
        if self.exporter is not None:
            self.exporter.end_all("draining", reason)

    def _refuse_export(self) -> Refusal | None:
        assert self.exporter is not None
        if not self.lifecycle.admits:
            return Refusal("draining", f"prefill pod {self.options.pod} is draining")
        queued = self.exporter.streams.queued
        if queued >= self.options.max_waiting:
            reason = f"{queued} prompts wait on prefill pod {self.options.pod} already"
            return Refusal("overloaded", reason)
        return None

    def _served(self, name: str) -> ServedModel:
        card = ModelCard(name, self.options.fleet or "tandem", int(self._started_unix_s))
        return ServedModel.of(card, self.bundle)


def _identity(options: ServeOptions, engine: Engine) -> Identity:
    layout = wire.Layout(
        pod=options.pod,
        revision=options.revision,
        layout_hash=engine.layout_hash,
        dtype=engine.layout.dtype,
        layers=engine.layout.layers,
        kv_heads=engine.layout.kv_heads,
        head_dim=engine.layout.head_dim,
        page_tokens=KV_PAGE_TOKENS,
    )
    page_bytes = KV_PAGE_TOKENS * engine.layout.token_bytes
    return Identity(options.secret, layout, page_bytes, lambda: os.urandom(wire.NONCE_BYTES))
