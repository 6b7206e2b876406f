"""Serving pods around hash engines, over HTTP on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import msgspec
from hash_engine import BLOCK_TOKENS, HashRunner, hash_engine
from small_vocabulary import byte_bundle
from tandem_runtime import contract
from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import Role
from tandem_runtime.frontend.server import HttpServer
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Tier
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import JobThread
from tandem_runtime.kv.tiers.peer import Peers
from tandem_runtime.protocol import (
    GenerateEvent,
    GenerateRequest,
    PodState,
    PrefillTarget,
    Sampling,
)
from tandem_runtime.serve.api import create_pod_app, inference_service
from tandem_runtime.serve.options import ServeOptions
from tandem_runtime.serve.pod import Pod
from tandem_runtime.serve.worker import EngineWorker

SECRET = b"a secret of thirty-two bytes...."
PROMPT = list(range(50))
OPTIONS = ServeOptions(
    role=Role.BOTH,
    model_name="hash",
    served_names=("hash", "alias"),
    engine=EngineConfig(model_uri="none", dtype="float32"),
    host="127.0.0.1",
    port=0,
    grpc_port=0,
    handoff_port=0,
    secret=SECRET,
    max_waiting=4,
    watchdog_s=1.5,
    pod="pod-0",
    uid="uid-0",
    fleet="fleet-1",
    revision="r1",
)


@dataclass
class Served:
    pod: Pod
    runner: HashRunner
    http: httpx.AsyncClient
    port: int
    handoff_port: int
    server: HttpServer
    ended: bool = False

    @property
    def holder(self) -> PrefillTarget:
        """As a gateway names it to another pod."""
        return PrefillTarget(self.pod.options.pod, "127.0.0.1", self.port)

    @property
    def target(self) -> PrefillTarget:
        return PrefillTarget(self.pod.options.pod, "127.0.0.1", self.handoff_port)

    async def state(self) -> PodState:
        reply = await self.http.get(contract.PATH_STATE)
        return msgspec.json.decode(reply.content, type=PodState)

    def view(self, **changes: Any) -> PodView:
        """As a gateway would see it."""
        options = self.pod.options
        fields: dict[str, Any] = {
            "uid": f"uid-{options.pod}",
            "name": options.pod,
            "ip": "127.0.0.1",
            "fleet": options.fleet,
            "role": options.role,
            "revision": options.revision,
            "served_names": options.served_names,
            "created_unix_s": 1.0,
            "ready": True,
            "leaving": False,
            "http_port": self.port,
            "handoff_port": self.handoff_port,
        }
        return PodView(**{**fields, **changes})

    async def end(self) -> None:
        """As the end of its process: connections break, nobody answers any more."""
        if not self.ended:
            self.ended = True
            await self.http.aclose()
            self.server._server.force_exit = True
            await self.server.stop()
            await self.pod.close()

    async def empty(self) -> None:
        await asyncio.wait_for(self.pod.empty(), 60)

        def nothing_held(engine: Any) -> bool | None:
            return True if engine.stats().held_blocks == 0 else None

        await asyncio.wait_for(self.pod.worker.until(nothing_held), 30)
        await self.pod.worker.call(lambda engine: engine.check_integrity())


def tier_cache(
    memory_pages: int = 0, disk: Path | None = None, *, peers: bool = False, compute_s: float = 1
) -> Callable[[KvLayout, bytes], TierCache]:
    """Tiers of pages of 256 tokens, on a thread as a pod has them."""

    def make(layout: KvLayout, layout_hash: bytes) -> TierCache:
        size = layout.token_bytes * contract.KV_PAGE_TOKENS
        tiers: list[Tier] = []
        if memory_pages:
            tiers.append(HostTier(memory_pages * size, page_bytes=size))
        if disk is not None:
            tiers.append(
                DiskTier(
                    disk,
                    1 << 28,
                    layout_hash=layout_hash,
                    page_bytes=size,
                    page_tokens=contract.KV_PAGE_TOKENS,
                )
            )
        others = Peers(
            contract.pod_token(SECRET),
            layout_hash=layout_hash,
            page_bytes=size,
            page_tokens=contract.KV_PAGE_TOKENS,
            block_tokens=BLOCK_TOKENS,
        )
        return TierCache(
            tiers,
            JobThread(),
            page_tokens=contract.KV_PAGE_TOKENS,
            compute_s=compute_s,
            peers=(others, JobThread("peers")) if peers else None,
        )

    return make


MakePod = Callable[..., Awaitable[Served]]


async def eventually(condition: Callable[[], bool], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is awaited here has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving_pods() -> AsyncIterator[MakePod]:
    """Yields a function that makes pods; they all end with the context."""
    served: list[Served] = []

    async def make(
        step_s: float = 0.0,
        blocks: int = 64,
        bundle: Mapping[str, object] = MappingProxyType({}),
        tiers: Callable[[KvLayout, bytes], TierCache] | None = None,
        disk: Path | None = None,
        peers: bool = False,
        **options: Any,
    ) -> Served:
        runner = HashRunner(blocks + 1, step_s)
        if peers:
            tiers = tiers or tier_cache(peers=True)
        worker = EngineWorker()
        secret = options.get("secret", SECRET)
        build = partial(
            hash_engine, blocks=blocks, runner=runner, tiers=tiers, prefix_secret=secret
        )
        engine = await worker.start(build)
        tokens = byte_bundle(cache_root=engine.layout_hash.hex(), **bundle)
        config = replace(OPTIONS.engine, peer_tier=peers)
        if disk is not None:
            config = replace(config, disk_tier_bytes=1, disk_tier_dir=str(disk))
        pod = Pod(replace(OPTIONS, engine=config, **options), worker, engine, tokens)
        handoff_port = 0
        if pod.exporter is not None:
            handoff_port = await pod.exporter.listen("127.0.0.1", 0)
        await pod.keep_contexts()
        server = HttpServer("127.0.0.1", 0)
        server.app = create_pod_app(pod, inference_service(pod))
        port = await server.start()
        headers = {"authorization": f"Bearer {contract.pod_token(SECRET)}"}
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers)
        served.append(Served(pod, runner, http, port, handoff_port, server))
        return served[-1]

    try:
        yield make
    finally:
        for pod in served:
            await pod.end()


def ask(
    prompt_ids: list[int] = PROMPT,
    *,
    stream: str = "s",
    epoch: int = 0,
    max_tokens: int = 5,
    logprobs: int | None = None,
    **fields: Any,
) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens, logprobs=logprobs)
    return GenerateRequest(stream, epoch, prompt_ids, sampling, **fields)


async def events(served: Served, request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
    body = msgspec.json.encode(request)
    async with served.http.stream(
        "POST", contract.PATH_GENERATE, content=body, timeout=10
    ) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            yield msgspec.json.decode(line, type=GenerateEvent)


async def collect(served: Served, request: GenerateRequest) -> list[GenerateEvent]:
    return [event async for event in events(served, request)]


def ids(received: list[GenerateEvent]) -> list[int]:
    return [token for event in received for token in event.token_ids]
