"""A gateway over pods in this process, discovered from a list that the test holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai
import pytest
from hash_pods import SECRET, MakePod, serving_pods
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.run import Gateway


@dataclass
class ListedPods:
    """A `Discovery` that the test changes by hand."""

    pods: tuple[PodView, ...] = ()
    synced: bool = True
    age_s: float = 0.0

    def show(self, *views: PodView) -> None:
        self.pods = views


@dataclass
class Front:
    gateway: Gateway
    discovery: ListedPods
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    grpc_url: str
    ended: bool = field(default=False)

    async def kill(self) -> None:
        """As the end of its process: connections break, and nobody is told anything."""
        self.ended = True
        client: Any = self.gateway._client
        client.cancel = lambda *_: None
        server = self.gateway._http._server
        server.force_exit = True
        for connection in list(server.server_state.connections):
            transport: Any = connection.transport
            transport.abort()
        await self.gateway._http.stop()
        await self.gateway._grpc.stop(None)
        for loop in self.gateway.loops:
            loop.cancel()
        await client.close()


@pytest.fixture
async def make_pod() -> AsyncIterator[MakePod]:
    async with serving_pods() as make:
        yield make


@pytest.fixture
async def front(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Front]:
    """Its options may be changed: `parametrize("front", [{"resume": False}], indirect=True)`."""
    monkeypatch.setattr("tandem_runtime.gateway.run._LINGER_S", 0.0)
    monkeypatch.setattr("tandem_runtime.gateway.health.PERIOD_S", 0.1)
    monkeypatch.setattr("tandem_runtime.gateway.health.SILENCE_S", 3.0)
    async with _running(ListedPods(), **getattr(request, "param", {})) as front:
        yield front


@pytest.fixture
async def second(front: Front) -> AsyncIterator[Front]:
    """Another replica, with the same view of the pods."""
    async with _running(front.discovery, pod="gateway-1") as second:
        yield second


@asynccontextmanager
async def _running(discovery: ListedPods, **changes: Any) -> AsyncIterator[Front]:
    options = GatewayOptions("ns", None, "127.0.0.1", 0, 0, SECRET, "gateway-0", "uid-gateway")
    options = replace(options, **changes)
    gateway = Gateway(options, discovery)
    port, grpc_port = await gateway.start()
    url = f"http://127.0.0.1:{port}"
    async with (
        httpx.AsyncClient(base_url=url, timeout=20) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        front = Front(gateway, discovery, http, client, f"127.0.0.1:{grpc_port}")
        yield front
    if not front.ended:
        await gateway.stop()
