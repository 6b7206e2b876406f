from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tandem.agent.checking import CommandResult, Target, Verdict, check, unsupported
from tandem.agent.probes import Probe, ProbeKind, ProbeState
from tandem.agent.probing import Prober


async def answer(request: web.Request) -> web.Response:
    if request.path == "/slow":
        await asyncio.sleep(5)
    if request.path == "/header":
        return web.Response(status=200 if request.headers["X-A"] == "b" else 400)
    return web.Response(status=int(request.path.strip("/")), text="the reason")


async def execute(argv: Sequence[str], timeout_s: float | None) -> CommandResult:
    if argv[0] == "hang":
        raise TimeoutError
    return CommandResult(int(argv[0]), "output")


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    async with TestServer(app, host="127.0.0.1") as server:
        assert server.port is not None
        yield Target("127.0.0.1", {"web": server.port, "closed": 1}, execute)


@pytest.mark.parametrize(
    ("http", "verdict"),
    [
        ({"path": "/200", "port": "web"}, Verdict(True)),
        ({"path": "399", "port": "web"}, Verdict(True)),
        (
            {"path": "/503", "port": "web"},
            Verdict(False, "HTTP probe failed with statuscode: 503 the reason"),
        ),
        ({"path": "/slow", "port": "web"}, Verdict(False, "no answer within 0.2 s")),
        (
            {"path": "/header", "port": "web", "httpHeaders": [{"name": "X-A", "value": "b"}]},
            Verdict(True),
        ),
        ({"port": "no"}, Verdict(False, "the container has no port named 'no'")),
    ],
)
async def test_http(target: Target, http: dict[str, Any], verdict: Verdict) -> None:
    assert await check({"httpGet": http}, target, 0.2) == verdict


async def test_a_closed_port(target: Target) -> None:
    for kind in ("httpGet", "tcpSocket"):
        verdict = await check({kind: {"port": "closed"}}, target, 1.0)
        assert not verdict.success
        assert "127.0.0.1" in verdict.message


async def test_tcp(target: Target) -> None:
    assert (await check({"tcpSocket": {"port": "web"}}, target, 1.0)).success


async def test_commands(target: Target) -> None:
    assert (await check({"exec": {"command": ["0"]}}, target, 1.0)).success
    assert await check({"exec": {"command": ["7"]}}, target, 1.0) == Verdict(False, "output")
    hung = await check({"exec": {"command": ["hang"]}}, target, 1.0)
    assert hung == Verdict(False, "no answer within 1 s")


async def test_what_cannot_be_done_says_so(target: Target) -> None:
    assert not (await check({"grpc": {"port": 1}}, target, 1.0)).success
    assert "cannot do grpc probes" in (unsupported({"grpc": {"port": 1}, "periodSeconds": 1}) or "")
    assert unsupported({"exec": {}}) is None


async def test_a_prober_waits_probes_and_stops() -> None:
    """A startup probe probes until it has decided, and not before its delay."""
    results: list[tuple[bool | None, bool]] = []
    codes = iter([1, 1, 0, 1, 1])

    async def run(argv: Sequence[str], timeout_s: float | None) -> CommandResult:
        return CommandResult(next(codes), "")

    def take(probe: Probe, state: ProbeState, verdict: Verdict) -> None:
        results.append((state.verdict, verdict.success))

    spec = {"exec": {"command": ["x"]}, "periodSeconds": 0.01, "failureThreshold": 5}
    probe = Probe.from_spec(ProbeKind.STARTUP, spec)
    prober = Prober(probe, Target("", {}, run), lambda: 0.0, lambda: True, take)
    async with asyncio.timeout(30):
        await prober.run()
    assert results == [(None, False), (None, False), (True, True)]


async def test_a_prober_that_is_not_due_does_nothing() -> None:
    spec = {"exec": {"command": ["0"]}, "periodSeconds": 0.01}
    probe = Probe.from_spec(ProbeKind.READINESS, spec)
    taken: list[object] = []
    prober = Prober(
        probe, Target("", {}, execute), lambda: 0.0, lambda: False, lambda *x: taken.append(x)
    )
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await prober.run()
    assert taken == []
