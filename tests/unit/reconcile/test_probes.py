"""Liveness, readiness and metrics over HTTP."""

from __future__ import annotations

import aiohttp
import pytest
from tandem_operator.metrics import Metrics
from tandem_operator.probes import Pulse, serve

PORT = 18_471


@pytest.fixture
def pulse() -> Pulse:
    return Pulse(lambda: 100.0)


async def ask(pulse: Pulse, metrics: Metrics, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{PORT}{path}"
    async with (
        serve(pulse, metrics, "127.0.0.1", PORT),
        aiohttp.ClientSession() as session,
        session.get(url) as response,
    ):
        return response.status, await response.text()


async def test_ready_once_the_api_server_answered(pulse: Pulse) -> None:
    assert (await ask(pulse, Metrics(), "/readyz"))[0] == 503
    pulse.answered()
    assert (await ask(pulse, Metrics(), "/readyz"))[0] == 200
    pulse.monotonic_s = lambda: 161.0
    assert (await ask(pulse, Metrics(), "/readyz"))[0] == 503


async def test_alive_while_every_loop_turns(pulse: Pulse) -> None:
    pulse.beat("resync", 10.0)
    assert (await ask(pulse, Metrics(), "/healthz"))[0] == 200
    pulse.monotonic_s = lambda: 111.0
    assert await ask(pulse, Metrics(), "/healthz") == (503, "no sign of life from: resync\n")


async def test_metrics(pulse: Pulse) -> None:
    metrics = Metrics()
    metrics.actions.labels("Delete", "Drained", "ok").inc()
    _, text = await ask(pulse, metrics, "/metrics")
    line = 'tandem_operator_actions_total{action="Delete",reason="Drained",result="ok"} 1.0'
    assert line in text
