"""Streams of a draining pod move to another one while they run, over real pods of hash engines."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hash_engine import continuation
from hash_pods import MakePod, Served, eventually
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.protocol import DrainRequest

TEXT = "The quick brown fox jumps over the lazy dog. "
MAX_TOKENS = 250


def expected(served: Served, salt: int, max_tokens: int = MAX_TOKENS) -> str:
    tokenizer = Tokenizer(served.pod.bundle)
    return tokenizer.decode(continuation(tokenizer.encode(TEXT * (salt + 1)), max_tokens))


class Client:
    def __init__(self, front: Any, salt: int, max_tokens: int = MAX_TOKENS) -> None:
        self.text = ""
        self.trace: dict[str, Any] = {}
        self.task = asyncio.create_task(self._read(front, salt, max_tokens))

    async def _read(self, front: Any, salt: int, max_tokens: int) -> None:
        body = {"model": "hash", "prompt": TEXT * (salt + 1), "max_tokens": max_tokens}
        body |= {"temperature": 0, "seed": 0, "stream": True}
        headers = {contract.HEADER_TRACE: "1"}
        async with front.http.stream("POST", "/v1/completions", json=body, headers=headers) as got:
            async for line in got.aiter_lines():
                if line.startswith("data: {"):
                    chunk = msgspec.json.decode(line[6:])
                    assert "error" not in chunk, chunk
                    self.text += "".join(choice["text"] for choice in chunk["choices"])
                    self.trace = chunk.get("tandem", self.trace)

    async def begun(self, characters: int = 5) -> None:
        await eventually(lambda: len(self.text) >= characters)


async def clients(front: Any, count: int, max_tokens: int = MAX_TOKENS) -> list[Client]:
    asking = [Client(front, salt, max_tokens) for salt in range(count)]
    for client in asking:
        await client.begun()
    return asking


async def metric(front: Any, name: str) -> float:
    text = (await front.http.get(contract.PATH_METRICS)).text
    values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)]
    return sum(float(value) for value in values)


async def undisturbed(front: Any, asking: list[Client], served: Served, **trace: Any) -> None:
    """Every client has the text of the undisturbed run, and no attempt has failed."""
    await asyncio.gather(*(client.task for client in asking))
    for salt, client in enumerate(asking):
        assert client.text == expected(served, salt)
        assert client.trace["attempts"] == 1
        assert {key: client.trace[key] for key in trace} == trace
    assert await metric(front, "tandem_gateway_attempt_failures_total") == 0


@pytest.fixture
async def pair(make_pod: MakePod) -> list[Served]:
    return [
        await make_pod(pod=n, role=Role.DECODE, step_s=0.004, max_waiting=16, blocks=300)
        for n in ("a", "b")
    ]


async def test_all_streams_of_a_draining_pod_move(front: Any, pair: list[Served]) -> None:
    a, b = pair
    front.discovery.show(a.view())
    asking = await clients(front, 6)
    front.discovery.show(a.view(leaving=True), b.view())
    await a.empty()
    assert not any(client.task.done() for client in asking), "it is empty before they end"
    await undisturbed(front, asking, b, decode_pod="b")
    assert await metric(front, 'tandem_gateway_migrations_total{outcome="moved"}') == 6
    assert await metric(front, "tandem_gateway_migration_pause_seconds_count") == 6
    await b.empty()


@pytest.mark.parametrize("front", [{"migrate": False}], indirect=True)
async def test_switched_off(front: Any, pair: list[Served]) -> None:
    """The streams end where they are."""
    a, b = pair
    front.discovery.show(a.view())
    asking = await clients(front, 2)
    front.discovery.show(a.view(leaving=True), b.view())
    await undisturbed(front, asking, a, decode_pod="a")
    assert await metric(front, "tandem_gateway_migrations_total") == 0


async def test_a_split_fleet_s_decode_pods(front: Any, make_pod: MakePod) -> None:
    prefill = await make_pod(pod="p", role=Role.PREFILL)
    a, b = [await make_pod(pod=n, role=Role.DECODE, step_s=0.004) for n in ("a", "b")]
    front.discovery.show(prefill.view(), a.view())
    asking = await clients(front, 2)
    front.discovery.show(prefill.view(), a.view(leaving=True), b.view())
    await a.empty()
    await undisturbed(front, asking, b, prefill_pod="p", decode_pod="b")


@pytest.mark.parametrize("how", ["drain", "stop"])
async def test_a_pod_that_says_so_itself(front: Any, pair: list[Served], how: str) -> None:
    """The operator's request, or SIGTERM: before the Kubernetes API has any word of it."""
    a, b = pair
    front.discovery.show(a.view())
    asking = await clients(front, 3)
    front.discovery.show(a.view(), b.view())
    if how == "drain":
        a.pod.drain(DrainRequest("drain"))
    else:
        a.pod.lifecycle.stop()
    await a.empty()
    await undisturbed(front, asking, b, decode_pod="b")


async def test_drains_that_follow_each_other(front: Any, pair: list[Served]) -> None:
    a, b = pair
    front.discovery.show(a.view(), b.view(ready=False))
    asking = await clients(front, 3)
    for leaves, stays in ((a, b), (b, a), (a, b)):
        front.discovery.show(leaves.view(leaving=True), stays.view())
        await asyncio.wait_for(leaves.empty(), 10)
    assert not any(client.task.done() for client in asking)
    await undisturbed(front, asking, b, decode_pod="b")


async def test_few_at_once(front: Any, pair: list[Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_runtime.gateway.moves.AT_ONCE", 2)
    a, b = pair
    front.discovery.show(a.view())
    asking = await clients(front, 6)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, *front.gateway.backend.moves._moving.values(), 0)
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    front.discovery.show(a.view(leaving=True), b.view())
    await asyncio.wait_for(a.empty(), 20)
    watching.cancel()
    assert most == 2
    await undisturbed(front, asking, b, decode_pod="b")


async def test_a_pod_of_another_revision_gets_none(front: Any, make_pod: MakePod) -> None:
    a = await make_pod(pod="a", step_s=0.004)
    b = await make_pod(pod="b", revision="r2")
    front.discovery.show(a.view())
    asking = await clients(front, 2)
    front.discovery.show(a.view(leaving=True), b.view())
    await undisturbed(front, asking, a, decode_pod="a")
    assert await metric(front, "tandem_gateway_migrations_total") == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"secret": b"another secret of many bytes...."}, "secret"),
        ({"revision": "r2"}, "revision"),
    ],
)
async def test_pods_that_do_not_belong_together(
    front: Any, make_pod: MakePod, options: dict[str, Any], reason: str
) -> None:
    """Whatever the labels say, the handshake does not let them: the streams end where they are."""
    a = await make_pod(pod="a", step_s=0.004)
    b = await make_pod(pod="b", **options)
    front.discovery.show(a.view())
    asking = await clients(front, 2)
    front.discovery.show(a.view(leaving=True), b.view(revision="r1"))
    await undisturbed(front, asking, a, decode_pod="a")
    assert await metric(front, 'tandem_gateway_migrations_total{outcome="failed"}') >= 2


@pytest.fixture
def slow_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of 16 tokens a step, and none of the tokens left: moves take as long as they may."""
    monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
    monkeypatch.setattr("tandem_runtime.kv.handoff.departure._FEW_TOKENS", -1)
    monkeypatch.setattr("tandem_runtime.kv.handoff.importer._HEADROOM_TOKENS", 164)


async def moving(pod: Served) -> None:
    assert pod.pod.exporter is not None
    counters = pod.pod.exporter.departures.counters
    await eventually(lambda: counters.bytes > 0)


@pytest.mark.usefixtures("slow_moves")
class TestInMidMove:
    async def test_the_drain_is_cancelled(self, front: Any, pair: list[Served]) -> None:
        a, b = pair
        front.discovery.show(a.view())
        asking = await clients(front, 2)
        front.discovery.show(a.view(leaving=True), b.view())
        await moving(a)
        front.discovery.show(a.view(), b.view())
        await undisturbed(front, asking, a, decode_pod="a")
        assert await metric(front, 'tandem_gateway_migrations_total{outcome="cancelled"}') == 2
        await a.empty()
        await b.empty()

    async def test_the_other_pod_dies(self, front: Any, pair: list[Served]) -> None:
        """Nothing has happened to the streams."""
        a, b = pair
        front.discovery.show(a.view())
        asking = await clients(front, 2)
        front.discovery.show(a.view(leaving=True), b.view())
        await moving(a)
        await b.end()
        await undisturbed(front, asking, a, decode_pod="a")
        await a.empty()

    async def test_this_pod_dies(self, front: Any, pair: list[Served]) -> None:
        """The streams are resumed: recomputed on the other pod."""
        a, b = pair
        front.discovery.show(a.view())
        asking = await clients(front, 2)
        front.discovery.show(a.view(leaving=True), b.view())
        await moving(a)
        await a.end()
        await asyncio.gather(*(client.task for client in asking))
        for salt, client in enumerate(asking):
            assert client.text == expected(b, salt)
            assert client.trace["decode_pod"] == "b"
        await b.empty()

    async def test_clients_leave(self, front: Any, pair: list[Served]) -> None:
        a, b = pair
        front.discovery.show(a.view())
        asking = await clients(front, 3)
        front.discovery.show(a.view(leaving=True), b.view())
        await moving(a)
        for client in asking:
            client.task.cancel()
        await asyncio.gather(*(client.task for client in asking), return_exceptions=True)
        await a.empty()
        await b.empty()
        assert not front.gateway.backend.moves._moving
