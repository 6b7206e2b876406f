"""A pod that gives a running stream, and one that takes it, against the other played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from handoff_ends import (
    DecodePod,
    LocalStream,
    Peer,
    PlayedPrefill,
    ask,
    eventually,
    identity,
    quick,
)
from hash_engine import HashRunner, _kv, continuation
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff import handshake
from tandem_runtime.kv.handoff.connection import connect
from tandem_runtime.kv.handoff.link import HandoffFailed
from tandem_runtime.kv.handoff.pages import checksum

Make = Callable[..., Any]
PROMPT = [5 * n % 256 for n in range(100)]
WHOLE = continuation(PROMPT, 200)
KNOWN = [*PROMPT, *WHOLE]


def page(start: int, end: int, epoch: int = 1) -> tuple[wire.Pages, bytes]:
    """The canonical KV of the stream's tokens, as a pod that is right would send it."""
    runner = HashRunner(-(-end // 16))
    for n, token_id in enumerate(KNOWN[:end]):
        runner.cache[n] = _kv(token_id, n)
    payload = bytes(runner.read_kv(list(range(-(-end // 16))), start, end))
    return wire.Pages("s", epoch, start, end - start, checksum(memoryview(payload))), payload


def news(start: int, end: int) -> wire.News:
    return wire.News("s", 1, tuple(wire.Token(token_id) for token_id in WHOLE[start:end]))


# -- a real pod gives the stream ---------------------------------------------------------------
class Giver:
    """A stream that runs, and the connection of a pod that wants it."""

    def __init__(self, pod: DecodePod, stream: LocalStream, peer: Peer) -> None:
        self.pod = pod
        self.stream = stream
        self.peer = peer

    async def until(self, kind: type[Any]) -> Any:
        while True:
            frame = (await asyncio.wait_for(self.peer.connection.receive(), 20)).frame
            if isinstance(frame, kind):
                return frame

    async def take(self, epoch: int = 1, known: int = 102, upto: int = 1000) -> None:
        await self.peer.send(wire.Take("s", epoch, known, known + 1000, 0, upto))

    async def stores(self, upto: int) -> None:
        await self.peer.send(wire.Grant("s", 1, upto, 1000))

    async def frozen(self) -> None:
        """Reports what comes until the stream stands still."""
        while True:
            frame = (await asyncio.wait_for(self.peer.connection.receive(), 20)).frame
            if isinstance(frame, wire.Pages):
                await self.stores(frame.first_token + frame.tokens)
            if isinstance(frame, wire.Frozen):
                return

    async def stays(self) -> None:
        assert await asyncio.wait_for(asyncio.shield(self.stream.ended), 20) == "length"
        assert self.stream.ids == WHOLE


@pytest.fixture
async def giver(make_decode: Make) -> AsyncIterator[Giver]:
    pod = await make_decode(name="decode-0", step_s=0.003)
    stream = await pod.begin(ask(PROMPT, None, max_tokens=200))
    await eventually(lambda: len(stream.tokens) >= 2)
    connection = await connect("127.0.0.1", pod.port, 1)
    await handshake.greet(connection, identity("decode-9"), "decode-0")
    yield Giver(pod, stream, Peer(connection))
    connection.abort("the test is over")


async def test_the_frames_that_give_a_stream(giver: Giver) -> None:
    await giver.take()
    sent, told, frozen = 0, 102, False
    while not frozen:
        received = await giver.peer.connection.receive()
        match received.frame:
            case wire.News(tokens=tokens):
                assert [t.token_id for t in tokens] == KNOWN[told : told + len(tokens)]
                told += len(tokens)
            case wire.Pages(first_token=first, tokens=count):
                assert first == sent
                assert first + count <= told, "its tokens were told before"
                assert bytes(received.payload) == page(first, first + count)[1]
                sent = first + count
                await giver.stores(sent)
            case wire.Frozen():
                frozen = True
    assert sent == told - 1, "the last token is computed by whoever goes on"
    assert giver.stream.known_tokens == told
    await giver.peer.send(wire.Ack("s", 1))
    assert await asyncio.wait_for(giver.stream.ended, 20) == "decode-9"
    await giver.pod.empty()


async def test_an_early_acknowledgement_is_none(giver: Giver) -> None:
    await giver.take(upto=0)
    await giver.peer.send(wire.Ack("s", 1))
    await giver.stays()


@pytest.mark.parametrize("when", ["running", "frozen"])
async def test_an_abort_lets_the_stream_go_on(giver: Giver, when: str) -> None:
    await giver.take()
    await (giver.until(wire.Pages) if when == "running" else giver.frozen())
    await giver.peer.send(wire.Abort("s", 1, "ended", "no more wanted"))
    await giver.until(wire.Aborted)
    await giver.stays()


async def test_a_pod_that_takes_and_says_no_more(
    giver: Giver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_runtime.kv.handoff.departure._ACK_S", 0.1)
    await giver.take()
    await giver.frozen()
    assert (await giver.until(wire.Abort)).reason == (
        "pod decode-9 did not take the stream within 0.1 s"
    )
    await giver.peer.send(wire.Ack("s", 1))  # too late
    await giver.stays()


async def test_without_credit_it_waits_and_the_stream_does_not(giver: Giver) -> None:
    await giver.take(upto=0)
    await eventually(lambda: len(giver.stream.tokens) > 60)
    await giver.peer.send(wire.Grant("s", 1, 0, 1000))
    await giver.frozen()
    await giver.peer.send(wire.Ack("s", 1))
    assert await asyncio.wait_for(giver.stream.ended, 20) == "decode-9"


async def test_it_stands_still_once_the_other_pod_has_stored(giver: Giver) -> None:
    """What was sent and not reported does not count: the stream goes on."""
    await giver.take()
    await giver.until(wire.Pages)
    tokens = len(giver.stream.tokens)
    await giver.stores(32)
    await eventually(lambda: len(giver.stream.tokens) > tokens + 40)
    assert giver.pod.pauses_s == []
    await giver.stores(102)
    await giver.frozen()
    await giver.peer.send(wire.Ack("s", 1))
    assert await asyncio.wait_for(giver.stream.ended, 20) == "decode-9"


async def test_a_pod_that_never_reports(giver: Giver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stays, and was not disturbed; its turn goes to another."""
    monkeypatch.setattr("tandem_runtime.kv.handoff.departure._REPORT_S", 0.1)
    await giver.take()
    frames = []
    while not isinstance(frames[-1] if frames else None, wire.Abort):
        frames.append((await giver.peer.connection.receive()).frame)
    assert frames[-1].reason == "pod decode-9 stored nothing more within 0.1 s"
    assert not any(isinstance(frame, wire.Frozen) for frame in frames)
    await giver.stores(102)  # too late
    await giver.stays()
    assert not giver.pod.exporter.departures.turn.locked()


async def test_it_is_decoded_until_its_turn_comes(giver: Giver) -> None:
    departures = giver.pod.exporter.departures
    async with departures.turn:
        await giver.take()
        tokens = len(giver.stream.tokens)
        await eventually(lambda: len(giver.stream.tokens) > tokens + 20)
        assert departures.counters.bytes == 0
    await giver.frozen()
    await giver.peer.send(wire.Ack("s", 1))
    assert await asyncio.wait_for(giver.stream.ended, 20) == "decode-9"


async def test_late_reports_take_nothing_back(giver: Giver) -> None:
    await giver.take()
    await giver.frozen()
    await giver.stores(16)
    await giver.peer.send(wire.Ack("s", 1))
    assert await asyncio.wait_for(giver.stream.ended, 20) == "decode-9"


async def test_a_pod_that_knows_more_than_there_is(giver: Giver) -> None:
    await giver.take(known=250)
    assert "knows more of the stream" in (await giver.until(wire.Abort)).reason
    await giver.stays()


async def test_a_connection_that_breaks_while_it_stands_still(giver: Giver) -> None:
    await giver.take()
    await giver.frozen()
    giver.peer.connection.abort("killed")
    await giver.stays()


async def test_prompts_are_not_computed_for_others(giver: Giver) -> None:
    await giver.peer.send(wire.Request(ask(PROMPT, None, stream="another")))
    abort = await giver.until(wire.Abort)
    assert (abort.stream, abort.code) == ("another", "bad_request")
    await giver.stays()


# -- a real pod takes the stream ---------------------------------------------------------------
class Taker:
    def __init__(self, pod: DecodePod, played: PlayedPrefill) -> None:
        self.pod = pod
        stream = LocalStream(pod, ask(PROMPT, None, max_tokens=200, output_ids=WHOLE[:2]))
        self.stream = asyncio.create_task(pod.take_over(stream, played.target))
        self.played = played

    async def begin(self) -> None:
        self.peer = await self.played.peer()
        take = await self.peer.expect(wire.Take)
        assert (take.key, take.known_tokens, take.have_tokens) == (("s", 1), 102, 0)
        assert take.upto_tokens <= 300

    async def fails(self, match: str) -> None:
        with pytest.raises(HandoffFailed, match=match):
            await asyncio.wait_for(self.stream, 20)
        await self.pod.empty()


@pytest.fixture
async def taker(make_decode: Make, played_prefill: PlayedPrefill) -> AsyncIterator[Taker]:
    taker = Taker(await make_decode(name="decode-1"), played_prefill)
    await taker.begin()
    yield taker
    taker.peer.connection.abort("the test is over")
    taker.stream.cancel()
    await asyncio.gather(taker.stream, return_exceptions=True)


async def test_the_frames_that_bring_a_stream(taker: Taker) -> None:
    for start in range(0, 96, 32):
        await taker.peer.send(*page(start, start + 32))
    await taker.peer.send(news(2, 10))
    await taker.peer.send(*page(96, 109))
    await taker.peer.send(wire.Frozen("s", 1))
    stream = await asyncio.wait_for(taker.stream, 20)
    await asyncio.wait_for(stream.ended, 20)
    assert stream.ids == WHOLE[2:]
    while not isinstance((await taker.peer.connection.receive()).frame, wire.Ack):
        pass


async def test_what_does_not_come_is_computed(taker: Taker) -> None:
    await taker.peer.send(*page(0, 32))
    await taker.peer.send(news(2, 10))
    await taker.peer.send(wire.Frozen("s", 1))
    stream = await asyncio.wait_for(taker.stream, 20)
    await asyncio.wait_for(stream.ended, 20)
    assert stream.ids == WHOLE[2:]


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([(page(32, 64))], "sent a wrong stream: .* came, but"),
        ([page(0, 32), page(0, 32)], "sent a wrong stream"),
        ([(wire.News("s", 1, (wire.Token(999),)), None)], r"a token is not in 0\.\.255"),
        ([(wire.News("s", 1, (wire.Token(1),) * 199), None)], "199 more tokens came"),
        ([(wire.Offer("s", 1, 100, 0, 0.0), None)], "Offer came of a stream that is decoded"),
        ([(wire.Abort("s", 1, "not_moved", "it has ended"), None)], "it has ended"),
        ([(wire.Pages("s", 1, 0, 32, 7), bytes(512))], "arrived damaged"),
        ([(page(0, 320)[0], page(0, 320)[1])], "sent more than granted|is gone"),
    ],
    ids=["gap", "again", "no token", "too many", "offer", "abort", "damaged", "too far"],
)
async def test_what_a_pod_does_not_send(
    taker: Taker, frames: list[tuple[wire.AnyFrame, bytes | None]], match: str
) -> None:
    for frame, payload in frames:
        await taker.peer.send(frame, payload)
    await taker.fails(match)


async def test_all_kv_and_nothing_left_to_compute(taker: Taker) -> None:
    for start in (0, 32, 64):
        await taker.peer.send(*page(start, start + 32))
    await taker.peer.send(*page(96, 102))
    await taker.peer.send(wire.Frozen("s", 1))
    await taker.fails("no token is left to compute")


@quick
async def test_a_silent_pod(taker: Taker) -> None:
    await taker.peer.send(*page(0, 32))
    await taker.fails(r"nothing heard for 1\.5 s")
