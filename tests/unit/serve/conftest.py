"""Pods around hash engines, served over HTTP on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
import pytest
from hash_engine import HashRunner, hash_engine
from small_vocabulary import byte_bundle
from tandem_runtime import contract
from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import Role
from tandem_runtime.frontend.server import HttpServer
from tandem_runtime.protocol import PodState, PrefillTarget
from tandem_runtime.serve.api import create_pod_app, inference_service
from tandem_runtime.serve.options import ServeOptions
from tandem_runtime.serve.pod import Pod
from tandem_runtime.serve.worker import EngineWorker

SECRET = b"a secret of thirty-two bytes...."
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
    fleet="fleet-1",
    revision="r1",
)


@dataclass
class Served:
    pod: Pod
    runner: HashRunner
    http: httpx.AsyncClient
    handoff_port: int

    @property
    def target(self) -> PrefillTarget:
        return PrefillTarget(self.pod.options.pod, "127.0.0.1", self.handoff_port)

    async def state(self) -> PodState:
        reply = await self.http.get(contract.PATH_STATE)
        return PodState(**reply.json())

    async def empty(self) -> None:
        await asyncio.wait_for(self.pod.empty(), 5)

        def nothing_held(engine: Any) -> bool | None:
            return True if engine.stats().held_blocks == 0 else None

        await asyncio.wait_for(self.pod.worker.until(nothing_held), 5)
        await self.pod.worker.call(lambda engine: engine.check_integrity())


@pytest.fixture
async def make_pod() -> AsyncIterator[Callable[..., Any]]:
    served: list[tuple[Served, HttpServer]] = []

    async def make(step_s: float = 0.0, blocks: int = 64, **options: Any) -> Served:
        runner = HashRunner(blocks + 1, step_s)
        worker = EngineWorker()
        engine = await worker.start(partial(hash_engine, blocks=blocks, runner=runner))
        pod = Pod(replace(OPTIONS, **options), worker, engine, byte_bundle())
        port = 0
        if pod.exporter is not None:
            port = await pod.exporter.listen("127.0.0.1", 0)
        server = HttpServer("127.0.0.1", 0)
        server.app = create_pod_app(pod, inference_service(pod))
        url = f"http://127.0.0.1:{await server.start()}"
        headers = {"authorization": f"Bearer {contract.pod_token(SECRET)}"}
        http = httpx.AsyncClient(base_url=url, headers=headers)
        served.append((Served(pod, runner, http, port), server))
        return served[-1][0]

    yield make
    for pod, server in served:
        await pod.http.aclose()
        await server.stop()
    for pod, _ in served:
        await pod.pod.close()
