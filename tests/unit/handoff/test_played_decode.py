"""A prefill pod against a decode pod played by hand: aborts, silence, slowness, nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from handoff_ends import PAGE_TOKENS, Peer, PrefillPod, ask, eventually, quick
from hash_engine import LAYOUT, continuation, hash_engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import ConnectionLost
from tandem_runtime.kv.handoff.pages import checksum
from tandem_runtime.kv.handoff.reader import PageReader
from tandem_runtime.protocol import Sampling

Make = Callable[..., Any]
Play = Callable[[PrefillPod], Awaitable[Peer]]
PROMPT = list(range(100))


async def begin(peer: Peer, *, tokens: int = 100, epoch: int = 0) -> None:
    request = ask([n % 256 for n in range(tokens)], None, epoch=epoch)
    await peer.send(wire.Request(request))


async def closed(peer: Peer) -> None:
    with contextlib.suppress(ConnectionLost):
        while True:
            await asyncio.wait_for(peer.connection.receive(), 20)


async def test_the_frames_of_one_stream(make_prefill: Make, play_decode: Play) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    offer = await peer.expect(wire.Offer)
    assert (offer.stream, offer.epoch) == ("s", 0)
    assert (offer.known_tokens, offer.cached_tokens) == (100, 0)
    await peer.send(wire.Grant("s", 0, 0, PAGE_TOKENS))
    page = await peer.expect(wire.Pages)
    assert (page.first_token, page.tokens) == (0, PAGE_TOKENS)
    await asyncio.sleep(0.2)
    await peer.send(wire.Grant("s", 0, 0, 100))
    cuts = [(p.first_token, p.tokens) for p in [await peer.expect(wire.Pages) for _ in range(3)]]
    assert cuts == [(32, 32), (64, 32), (96, 4)]
    first = await peer.expect(wire.First)
    assert first.token_id == continuation(PROMPT, 1)[0]
    assert (await pod.stats()).held == 1, "kept until it is acknowledged"
    await peer.send(wire.Ack("s", 0))
    await pod.empty()
    assert pod.exporter.counters.streams == 1


async def test_a_prompt_is_offered_before_it_is_computed(
    make_prefill: Make, play_decode: Play
) -> None:
    """The decode pod makes room meanwhile."""
    pod = await make_prefill()
    granted = threading.Event()
    pod.runner.not_finite = lambda sample: not granted.wait(20)
    peer = await play_decode(pod)
    await begin(peer, tokens=20)
    offer = await peer.expect(wire.Offer)
    assert offer.known_tokens == 20
    assert pod.exporter.streams.computing == 1
    await peer.send(wire.Grant("s", 0, 0, 20))
    granted.set()
    assert (await peer.expect(wire.Pages)).tokens == 20
    await peer.expect(wire.First)
    await peer.send(wire.Ack("s", 0))


async def test_nothing_is_sent_beyond_the_credit(make_prefill: Make, play_decode: Play) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await peer.expect(wire.Offer)
    await peer.send(wire.Grant("s", 0, 0, 2 * PAGE_TOKENS))
    for _ in range(2):
        await peer.expect(wire.Pages)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(peer.expect(wire.Pages), 0.3)


@pytest.mark.parametrize("state", ["requested", "offered", "granted", "sending", "first"])
async def test_an_abort_in_any_state_frees_the_stream(
    make_prefill: Make, play_decode: Play, state: str
) -> None:
    pod = await make_prefill(step_s=0.01)
    peer = await play_decode(pod)
    await begin(peer)
    if state != "requested":
        await peer.expect(wire.Offer)
    if state in ("granted", "sending", "first"):
        await peer.send(wire.Grant("s", 0, 0, 100 if state == "first" else PAGE_TOKENS))
    if state in ("sending", "first"):
        await peer.expect(wire.Pages)
    if state == "first":
        for _ in range(3):
            await peer.expect(wire.Pages)
        await peer.expect(wire.First)
    await peer.send(wire.Abort("s", 0, "ended", "the client left"))
    while not isinstance(frame := (await peer.connection.receive()).frame, wire.Aborted):
        assert not isinstance(frame, wire.Abort)
    await pod.empty()


async def test_an_abort_of_an_unknown_stream_is_confirmed(
    make_prefill: Make, play_decode: Play
) -> None:
    peer = await play_decode(await make_prefill())
    await peer.send(wire.Abort("nobody", 3, "ended", "gone"))
    assert await peer.expect(wire.Aborted) == wire.Aborted("nobody", 3)


@pytest.mark.parametrize("state", ["offered", "sending", "first"])
async def test_a_connection_that_closes_frees_its_streams_at_once(
    make_prefill: Make, play_decode: Play, state: str
) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await peer.expect(wire.Offer)
    if state != "offered":
        await peer.send(wire.Grant("s", 0, 0, 100 if state == "first" else PAGE_TOKENS))
        await peer.expect(wire.Pages)
    peer.connection.abort("killed")
    await asyncio.wait_for(pod.empty(), 20)


@quick
async def test_a_silent_stream_loses_its_lease(make_prefill: Make, play_decode: Play) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await peer.expect(wire.Offer)
    for _ in range(60):  # heartbeats that do not name the stream
        await peer.send(wire.Heartbeat(()))
        await asyncio.sleep(0.05)
    abort = await peer.expect(wire.Abort)
    assert (abort.code, abort.retryable) == ("lease_expired", True)
    assert "said nothing for 2 s" in abort.reason
    await pod.empty()


@quick
async def test_a_heartbeat_keeps_a_stream(make_prefill: Make, play_decode: Play) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await peer.expect(wire.Offer)
    for _ in range(50):
        await peer.send(wire.Heartbeat((("s", 0),)))
        await asyncio.sleep(0.06)
    await peer.send(wire.Grant("s", 0, 0, 100))
    await peer.expect(wire.Pages)


@quick
async def test_a_silent_connection_is_given_up(make_prefill: Make, play_decode: Play) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await closed(peer)
    await pod.empty()


@quick
async def test_the_prefill_pod_says_which_streams_it_works_on(
    make_prefill: Make, play_decode: Play
) -> None:
    peer = await play_decode(await make_prefill())
    assert await peer.expect(wire.Heartbeat) == wire.Heartbeat(())
    await begin(peer)
    await peer.expect(wire.Offer)
    assert await peer.expect(wire.Heartbeat) == wire.Heartbeat((("s", 0),))


async def test_a_slow_reader_holds_up_neither_memory_nor_other_streams(
    make_prefill: Make, play_decode: Play
) -> None:
    """Half a million tokens of KV for one who does not read: they wait in the sender's blocks."""
    pod = await make_prefill(blocks=520, max_batch_tokens=4096)
    slow, quick = await play_decode(pod), await play_decode(pod)
    await slow.send(wire.Request(ask([n % 256 for n in range(8000)], None, stream="slow")))
    await slow.expect(wire.Offer)
    await slow.send(wire.Grant("slow", 0, 0, 8000))
    await begin(quick)
    await quick.expect(wire.Offer)
    await quick.send(wire.Grant("s", 0, 0, 100))
    for _ in range(4):
        await quick.expect(wire.Pages)
    await quick.expect(wire.First)
    await quick.send(wire.Ack("s", 0))
    await eventually(lambda: pod.exporter.counters.streams == 1)
    received = 0
    while received < 8000:
        received += (await slow.expect(wire.Pages)).tokens
    await slow.expect(wire.First)
    await slow.send(wire.Ack("slow", 0))
    await pod.empty()


async def test_a_late_grant_and_a_second_ack_do_no_harm(
    make_prefill: Make, play_decode: Play
) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer, tokens=10)
    await peer.expect(wire.Offer)
    await peer.send(wire.Grant("s", 0, 0, 10))
    await peer.expect(wire.Pages)
    await peer.expect(wire.First)
    for _ in range(2):
        await peer.send(wire.Ack("s", 0))
    await peer.send(wire.Grant("s", 0, 0, 10))
    await pod.empty()
    await begin(peer, tokens=12, epoch=1)
    await peer.expect(wire.Offer)


@pytest.mark.parametrize("have", [16, 48, 96])
async def test_pages_begin_where_the_decode_pod_says(
    make_prefill: Make, play_decode: Play, have: int
) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await peer.expect(wire.Offer)
    await peer.send(wire.Grant("s", 0, have, 100))
    at = have
    while at < 100:
        received = await asyncio.wait_for(peer.connection.receive(), 20)
        if isinstance(frame := received.frame, wire.Pages):
            assert frame.first_token == at
            assert received.payload.nbytes == frame.tokens * LAYOUT.token_bytes
            assert frame.checksum == checksum(received.payload)
            at += frame.tokens
    await peer.expect(wire.First)


@pytest.mark.parametrize(
    "frame",
    [
        wire.Offer("s", 0, 1, 0, 0.0),
        wire.First("s", 0, 1),
        wire.Hello(1, bytes(32)),
        wire.Proof(bytes(32)),
    ],
)
async def test_frames_that_a_decode_pod_does_not_send(
    make_prefill: Make, play_decode: Play, frame: wire.AnyFrame
) -> None:
    pod = await make_prefill()
    peer = await play_decode(pod)
    await begin(peer)
    await peer.send(frame)
    await closed(peer)
    await pod.empty()


@pytest.mark.parametrize("tokens", [20, 300], ids=["in the first chunk", "in the last one"])
async def test_a_model_that_gives_no_number(
    make_prefill: Make, play_decode: Play, tokens: int
) -> None:
    """The stream is aborted at once, whatever the decode pod owes, and for good."""
    pod = await make_prefill(step_s=0.01)
    pod.runner.not_finite = lambda sample: sample.position == tokens
    peer = await play_decode(pod)
    await begin(peer, tokens=tokens)
    await peer.expect(wire.Offer)
    abort = await peer.expect(wire.Abort)
    assert (abort.code, abort.retryable) == ("not_finite", False)
    assert abort.reason == "the model's output for this stream is not a number"
    await pod.empty()
    await peer.send(wire.Grant("s", 0, 0, tokens))
    await peer.send(wire.Aborted("s", 0))
    await begin(peer, tokens=40, epoch=1)
    await peer.expect(wire.Offer)
    await peer.send(wire.Abort("s", 1, "ended", "the test is over"))
    await peer.expect(wire.Aborted)


async def test_no_page_is_read_of_a_stream_that_the_engine_ended() -> None:
    """A grant may come between the engine's end of a stream and the event loop's."""
    reader = PageReader(asyncio.get_running_loop(), PAGE_TOKENS)
    engine = hash_engine(max_batch_tokens=64)
    engine._runner.not_finite = lambda sample: True
    engine.add(Request("s", list(range(100)), Sampling(max_tokens=2), export=True))
    reader.begin("s", 100, 0, lambda pages: None)
    for _ in range(2):
        reader.after_step(engine, engine.step())
    assert engine.stats().held_blocks == 0
    reader.allow(engine, "s", 100)
    reader.restart(engine, "s", 16)


async def test_a_stream_that_is_ended_before_its_task_ran(
    make_prefill: Make, play_decode: Play
) -> None:
    pod = await make_prefill()

    def end_at_once() -> None:
        asyncio.get_running_loop().call_soon(pod.exporter.end_all, "draining", "so soon")

    pod.exporter.admit = end_at_once
    peer = await play_decode(pod)
    await begin(peer)
    assert (await peer.expect(wire.Abort)).code == "draining"
    await pod.empty()
    assert pod.exporter.streams.total == 0
    assert pod.exporter.counters.failures["draining"] == 1
