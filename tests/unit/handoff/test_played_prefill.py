"""A decode pod against a prefill pod played by hand: aborts, silence, damage, late pages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from handoff_ends import PAGE_TOKENS, DecodePod, Peer, PlayedPrefill, ask, eventually, ids, quick
from hash_engine import LAYOUT, HashRunner, continuation
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.link import HandoffFailed
from tandem_runtime.kv.handoff.pages import checksum
from tandem_runtime.protocol import GenerateRequest

Make = Callable[..., Any]
PROMPT = [3 * n % 256 for n in range(100)]


def kv(prompt: list[int], start: int, end: int) -> bytes:
    """The canonical KV that a real prefill pod would send."""
    runner = HashRunner(-(-len(prompt) // 16))
    from hash_engine import _kv

    for n, token_id in enumerate(prompt):
        runner.cache[n] = _kv(token_id, n)
    return bytes(runner.read_kv(list(range(-(-len(prompt) // 16))), start, end))


def page(start: int, end: int, epoch: int = 0, stream: str = "s") -> tuple[wire.Pages, bytes]:
    payload = kv(PROMPT, start, end)
    frame = wire.Pages(stream, epoch, start, end - start, checksum(memoryview(payload)))
    return frame, payload


def request(played: PlayedPrefill, epoch: int = 0) -> GenerateRequest:
    return ask(PROMPT, played.target, epoch=epoch)


def offer(epoch: int = 0) -> wire.Offer:
    return wire.Offer("s", epoch, len(PROMPT), 0, 0.0)


class Scene:
    """One stream that has begun, and both ends of it."""

    def __init__(self, pod: DecodePod, played: PlayedPrefill) -> None:
        self.pod = pod
        self.played = played
        self.stream: asyncio.Task[Any]
        self.peer: Peer

    async def begin(self, epoch: int = 0) -> None:
        self.stream = asyncio.create_task(self.pod.generate(request(self.played, epoch)))
        if not hasattr(self, "peer"):
            self.peer = await self.played.peer()
        asked = await self.peer.expect(wire.Request)
        assert asked.request.prefill is None
        assert asked.request.epoch == epoch

    async def granted(self, epoch: int = 0) -> wire.Grant:
        await self.begin(epoch)
        await self.peer.send(offer(epoch))
        return await self.peer.expect(wire.Grant)

    async def fails(self, code: str, match: str) -> None:
        with pytest.raises(HandoffFailed, match=match) as failure:
            await asyncio.wait_for(self.stream, 20)
        assert failure.value.code == code
        await self.pod.empty()

    async def told(self) -> wire.Abort:
        """The decode pod's abort; grants may come before it."""
        while True:
            frame = (await asyncio.wait_for(self.peer.connection.receive(), 20)).frame
            if isinstance(frame, wire.Abort):
                return frame


@pytest.fixture
async def scene(make_decode: Make, played_prefill: PlayedPrefill) -> Any:
    scene = Scene(await make_decode(), played_prefill)
    yield scene
    if hasattr(scene, "peer"):
        scene.peer.connection.abort("the test is over")
    scene.stream.cancel()
    await asyncio.gather(scene.stream, return_exceptions=True)


async def test_the_frames_of_one_stream(scene: Scene) -> None:
    grant = await scene.granted()
    assert (grant.have_tokens, grant.upto_tokens) == (0, 100)
    for start in range(0, 100, PAGE_TOKENS):
        await scene.peer.send(*page(start, min(start + PAGE_TOKENS, 100)))
    await scene.peer.send(wire.First("s", 0, continuation(PROMPT, 1)[0]))
    assert ids(await asyncio.wait_for(scene.stream, 20)) == continuation(PROMPT, 5)
    assert await scene.peer.expect(wire.Ack) == wire.Ack("s", 0)


async def test_the_prefill_pod_is_asked_while_a_step_runs(scene: Scene) -> None:
    over = threading.Event()
    step = scene.pod.worker.call(lambda engine: over.wait(60))
    await scene.begin()
    assert not step.done()
    over.set()
    await scene.peer.send(offer())
    await scene.peer.expect(wire.Grant)


async def test_a_stream_that_has_ended_already_is_given_back(scene: Scene) -> None:
    ended = ask(PROMPT, scene.played.target, max_tokens=2, output_ids=[1, 2])
    importer = scene.pod.importer
    request = Request("s#0", ended.prompt_ids, ended.sampling, ended.output_ids)
    scene.stream = asyncio.create_task(importer.receive(request, ended))
    scene.peer = await scene.played.peer()
    assert await asyncio.wait_for(scene.stream, 20) == "length"
    await scene.peer.expect(wire.Request)
    assert (await scene.told()).code == "ended"
    await scene.pod.empty()


@pytest.mark.parametrize("state", ["requested", "offered", "paged"])
async def test_an_abort_in_any_state(scene: Scene, state: str) -> None:
    await (scene.begin() if state == "requested" else scene.granted())
    if state == "paged":
        await scene.peer.send(*page(0, 32))
    await scene.peer.send(wire.Abort("s", 0, "draining", "this pod is draining"))
    await scene.fails("draining", "this pod is draining")
    while not isinstance((await scene.peer.connection.receive()).frame, wire.Aborted):
        pass


@pytest.mark.parametrize("state", ["requested", "offered", "paged"])
async def test_a_connection_that_breaks(scene: Scene, state: str) -> None:
    await (scene.begin() if state == "requested" else scene.granted())
    if state == "paged":
        await scene.peer.send(*page(0, 32))
    scene.peer.connection.abort("killed")
    await scene.fails("prefill_lost", "pod prefill-0 is gone")


async def test_a_damaged_page(scene: Scene) -> None:
    await scene.granted()
    frame, payload = page(0, 32)
    damaged = bytearray(payload)
    damaged[100] ^= 1
    await scene.peer.send(frame, bytes(damaged))
    await scene.fails("prefill_lost", r"KV of tokens from 0 on arrived damaged \(checksum\)")
    assert (await scene.told()).stream == "s"


@pytest.mark.parametrize(
    ("cut", "match"),
    [
        ((32, 64), "prefill pod sent wrong KV"),  # a gap
        ((0, 20), "KV was due|prefill pod sent wrong KV"),  # then First, too early
        ((96, 100), "prefill pod sent wrong KV"),
    ],
)
async def test_pages_out_of_order(scene: Scene, cut: tuple[int, int], match: str) -> None:
    await scene.granted()
    await scene.peer.send(*page(*cut))
    await scene.peer.send(wire.First("s", 0, 7))
    await scene.fails("prefill_lost", match)


async def test_a_page_of_the_wrong_size(scene: Scene) -> None:
    await scene.granted()
    payload = kv(PROMPT, 0, 32)[:-3]
    await scene.peer.send(wire.Pages("s", 0, 0, 32, checksum(memoryview(payload))), payload)
    await scene.fails("prefill_lost", "no whole number of tokens")


async def test_more_than_granted(make_decode: Make, played_prefill: PlayedPrefill) -> None:
    scene = Scene(await make_decode(), played_prefill)
    await scene.begin()
    await scene.peer.send(*page(0, 32))  # nothing is granted before the offer
    await scene.fails("prefill_lost", "sent more than granted")
    scene.peer.connection.abort("the test is over")


async def test_a_first_token_that_is_none(scene: Scene) -> None:
    await scene.granted()
    for start in range(0, 100, PAGE_TOKENS):
        await scene.peer.send(*page(start, min(start + PAGE_TOKENS, 100)))
    await scene.peer.send(wire.First("s", 0, 9999))
    await scene.fails("prefill_lost", "first token 9999 is not in 0..255")


@quick
async def test_a_silent_stream_loses_its_lease(scene: Scene) -> None:
    await scene.granted()

    async def heartbeats() -> None:
        while True:
            await scene.peer.send(wire.Heartbeat(()))
            await asyncio.sleep(0.05)

    beating = asyncio.create_task(heartbeats())
    await scene.fails("lease_expired", "pod prefill-0 was silent for 2 s")
    beating.cancel()
    assert (await scene.told()).stream == "s"


@quick
async def test_a_silent_connection_is_given_up(scene: Scene) -> None:
    await scene.granted()
    await scene.fails("prefill_lost", r"nothing heard for 1\.5 s")


@quick
async def test_heartbeats_keep_a_stream_that_waits_for_prefill(scene: Scene) -> None:
    await scene.begin()
    for _ in range(50):
        await scene.peer.send(wire.Heartbeat((("s", 0),)))
        await asyncio.sleep(0.06)
    assert not scene.stream.done()


async def test_a_late_page_of_an_old_attempt_is_dropped(scene: Scene) -> None:
    """The pod that sent it was stopped for a while; meanwhile the stream was begun again."""
    await scene.granted()
    scene.stream.cancel()
    await scene.told()
    await scene.granted(epoch=1)
    late = kv(PROMPT[::-1], 0, 32)  # what would spoil the new attempt's cache
    frame = wire.Pages("s", 0, 0, 32, checksum(memoryview(late)))
    await scene.peer.send(frame, late)
    for start in range(0, 100, PAGE_TOKENS):
        await scene.peer.send(*page(start, min(start + PAGE_TOKENS, 100), epoch=1))
    await scene.peer.send(frame, late)
    await scene.peer.send(wire.First("s", 1, continuation(PROMPT, 1)[0]))
    assert ids(await asyncio.wait_for(scene.stream, 20)) == continuation(PROMPT, 5)


async def test_a_caller_that_leaves_tells_the_prefill_pod(scene: Scene) -> None:
    await scene.granted()
    await scene.peer.send(*page(0, 32))
    scene.stream.cancel()
    abort = await scene.told()
    assert (abort.stream, abort.epoch) == ("s", 0)
    await scene.pod.empty()


async def test_credit_follows_what_was_stored(
    make_decode: Make, played_prefill: PlayedPrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_runtime.kv.handoff.importer._WINDOW_BYTES", 1)  # two pages
    scene = Scene(await make_decode(), played_prefill)
    grant = await scene.granted()
    assert grant.upto_tokens == 64
    await scene.peer.send(*page(0, 32))
    assert (await scene.peer.expect(wire.Grant)).upto_tokens == 96
    await scene.peer.send(*page(32, 64))
    assert (await scene.peer.expect(wire.Grant)).upto_tokens == 100
    for cut in ((64, 96), (96, 100)):
        await scene.peer.send(*page(*cut))
    await scene.peer.send(wire.First("s", 0, continuation(PROMPT, 1)[0]))
    assert ids(await asyncio.wait_for(scene.stream, 20)) == continuation(PROMPT, 5)
    assert scene.pod.importer.counters.bytes == 100 * LAYOUT.token_bytes
    scene.peer.connection.abort("the test is over")


@pytest.mark.parametrize(
    "frame",
    [wire.Request(ask([1], None)), wire.Hello(1, bytes(32)), wire.Refused("no")],
)
async def test_frames_that_a_prefill_pod_does_not_send(scene: Scene, frame: wire.AnyFrame) -> None:
    await scene.granted()
    await scene.peer.send(frame)
    await scene.fails("prefill_lost", "a sending pod does not send")


async def test_one_failing_stream_leaves_the_others(
    make_decode: Make, played_prefill: PlayedPrefill
) -> None:
    pod = await make_decode()
    good = asyncio.create_task(pod.generate(ask(PROMPT, played_prefill.target, stream="good")))
    peer = await played_prefill.peer()
    await peer.expect(wire.Request)
    bad = asyncio.create_task(pod.generate(ask(PROMPT, played_prefill.target, stream="bad")))
    await peer.expect(wire.Request)
    for stream in ("good", "bad"):
        await peer.send(wire.Offer(stream, 0, 100, 0, 0.0))
        await peer.expect(wire.Grant)
    frame, payload = page(0, 32, stream="bad")
    await peer.send(frame, payload[::-1])
    with pytest.raises(HandoffFailed):
        await bad
    for start in range(0, 100, PAGE_TOKENS):
        await peer.send(*page(start, min(start + PAGE_TOKENS, 100), stream="good"))
    await peer.send(wire.First("good", 0, continuation(PROMPT, 1)[0]))
    assert ids(await asyncio.wait_for(good, 20)) == continuation(PROMPT, 5)
    await eventually(lambda: pod.importer.counters.streams == 1)
    peer.connection.abort("the test is over")
