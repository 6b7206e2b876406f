"""Running streams between two pods over real sockets: what moves, and who has them if it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from handoff_ends import DecodePod, LocalStream, ask, eventually, quick
from hash_engine import LAYOUT, VOCAB_SIZE, continuation
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff import importer
from tandem_runtime.kv.handoff.link import HandoffFailed
from tandem_runtime.protocol import Sampling

Make = Callable[..., Any]


def prompt(tokens: int, salt: int = 0) -> list[int]:
    return [(7 * n + salt) % VOCAB_SIZE for n in range(tokens)]


async def begun(pod: DecodePod, prompt_ids: list[int], tokens: int = 3, **fields: Any) -> Any:
    """A stream that has had so many tokens."""
    stream = await pod.begin(ask(prompt_ids, None, **fields))
    await eventually(lambda: len(stream.tokens) >= tokens)
    return stream


async def ended(stream: LocalStream) -> str:
    return await asyncio.wait_for(asyncio.shield(stream.ended), 20)


class TestMoves:
    @pytest.mark.parametrize("tokens", [1, 15, 16, 31, 33, 64, 200, 500])
    async def test_any_length(self, make_decode: Make, tokens: int) -> None:
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1", step_s=0.002)
        before = await begun(a, prompt(tokens), max_tokens=300)
        after = await b.take_over(before, a.target)
        assert await ended(before) == "decode-1"
        assert await ended(after) == "length"
        whole = continuation(prompt(tokens), 300)
        assert after.ask.output_ids + after.ids == whole
        assert before.ids == whole[: len(before.ids)]
        moved = b.importer.takeovers.bytes
        assert moved == a.exporter.departures.counters.bytes
        assert moved >= (tokens + 2) * LAYOUT.token_bytes
        assert len(a.pauses_s) == 1
        assert 0 <= a.pauses_s[0] < 1
        await a.empty()

    async def test_it_goes_on_meanwhile_and_stands_still_shortly(self, make_decode: Make) -> None:
        a = await make_decode(name="decode-0", step_s=0.01, blocks=200)
        b = await make_decode(name="decode-1", step_s=0.01, blocks=200)
        before = await begun(a, prompt(2000), max_tokens=400)
        known = len(before.tokens)
        after = await b.take_over(before, a.target)
        assert len(before.tokens) >= known
        assert await ended(after) == "length"
        assert after.ask.output_ids + after.ids == continuation(prompt(2000), 400)
        assert a.pauses_s[0] < 0.2

    async def test_ten_at_once(self, make_decode: Make) -> None:
        a = await make_decode(name="decode-0", step_s=0.003, blocks=300)
        b = await make_decode(name="decode-1", step_s=0.003, blocks=300)
        prompts = [prompt(20 * n + 5, salt=n) for n in range(10)]
        streams = [await begun(a, p, stream=f"s{n}", max_tokens=200) for n, p in enumerate(prompts)]
        moved = await asyncio.gather(*(b.take_over(stream, a.target) for stream in streams))
        for stream in moved:
            assert await ended(stream) == "length"
        assert [s.ask.output_ids + s.ids for s in moved] == [continuation(p, 200) for p in prompts]

    async def test_what_the_other_pod_holds_is_not_sent(self, make_decode: Make) -> None:
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1")
        await ended(await b.begin(ask(prompt(160), None, stream="earlier")))
        before = await begun(a, prompt(160), max_tokens=300)
        after = await b.take_over(before, a.target)
        assert await ended(after) == "length"
        assert after.ask.output_ids + after.ids == continuation(prompt(160), 300)
        computed = 160 + len(after.ask.output_ids)
        assert b.importer.takeovers.bytes <= (computed - 160 + 300) * LAYOUT.token_bytes
        grown = b.importer.takeovers.bytes // LAYOUT.token_bytes
        assert grown < 160, "the prompt's ten blocks were there"

    async def test_there_and_back(self, make_decode: Make) -> None:
        a = await make_decode(name="decode-0", step_s=0.004)
        b = await make_decode(name="decode-1", step_s=0.004)
        stream = await begun(a, prompt(90), max_tokens=400)
        for pod, source in ((b, a), (a, b), (b, a), (a, b)):
            stream = await pod.take_over(stream, source.target)
            await asyncio.sleep(0.05)
        assert await ended(stream) == "length"
        assert stream.ask.output_ids + stream.ids == continuation(prompt(90), 400)
        assert a.exporter.departures.counters.streams == 2

    async def test_logprobs_travel(self, make_decode: Make) -> None:
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1")
        before = await begun(a, prompt(600), max_tokens=300, logprobs=2)
        after = await b.take_over(before, a.target)
        await ended(after)
        assert all(len(token.top_logprobs) == 2 for token in after.tokens)
        alone = await begun(b, prompt(600), stream="alone", max_tokens=300, logprobs=2)
        await ended(alone)
        assert after.tokens == alone.tokens[len(after.ask.output_ids) :]

    async def test_credit_is_raised_as_pages_arrive(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tandem_runtime.kv.handoff.importer._WINDOW_BYTES", 1)  # two pages
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)  # a page
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1", step_s=0.002)
        before = await begun(a, prompt(500), max_tokens=300)
        after = await b.take_over(before, a.target)
        await ended(after)
        assert after.ask.output_ids + after.ids == continuation(prompt(500), 300)

    async def test_a_stream_that_outruns_its_pages_is_stopped(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The link is slower than the stream: it stands still before the agreed room is used up."""
        monkeypatch.setattr("tandem_runtime.kv.handoff.importer._HEADROOM_TOKENS", 200)
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._FEW_TOKENS", -1)
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1")
        before = await begun(a, prompt(100), max_tokens=600)
        after = await b.take_over(before, a.target)
        assert len(before.ids) > len(after.ask.output_ids) + 100
        assert len(before.ids) <= len(after.ask.output_ids) + 200
        await ended(after)
        assert after.ask.output_ids + after.ids == continuation(prompt(100), 600)


class TestFailures:
    async def stays(self, a: DecodePod, before: LocalStream, reason: str) -> None:
        """The stream ends where it was, undisturbed."""
        assert await ended(before) == "length"
        assert before.ids == continuation(before.ask.prompt_ids, len(before.ids))
        assert len(before.ids) == before.ask.sampling.max_tokens
        assert a.exporter.departures.counters.failures[reason] == 1

    @pytest.mark.parametrize("wait_s", [0.0, 0.005, 0.01, 0.02, 0.04, 0.08])
    async def test_cancelled_at_any_moment(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch, wait_s: float
    ) -> None:
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1", step_s=0.002)
        before = await begun(a, prompt(700), max_tokens=200)
        moving = asyncio.create_task(b.take_over(before, a.target))
        await asyncio.sleep(wait_s)
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await b.worker.call(lambda engine: engine.abort("s#1"))
        if not moving.cancelled():  # it was quicker
            assert await ended(before) == "decode-1"
            return
        assert await ended(before) == "length"
        assert before.ids == continuation(prompt(700), 200)

    async def test_the_other_pod_dies_in_mid_transfer(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
        a = await make_decode(name="decode-0", step_s=0.005)
        b = await make_decode(name="decode-1", step_s=0.005)
        before = await begun(a, prompt(700), max_tokens=60)
        moving = asyncio.create_task(b.take_over(before, a.target))
        await eventually(lambda: a.exporter.departures.counters.bytes > 0)
        await b.importer.close()
        with pytest.raises(HandoffFailed):
            await moving
        await self.stays(a, before, "connection_lost")

    async def test_this_pod_dies_in_mid_transfer(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
        a = await make_decode(name="decode-0", step_s=0.005)
        b = await make_decode(name="decode-1", step_s=0.005)
        before = await begun(a, prompt(700), max_tokens=60)
        moving = asyncio.create_task(b.take_over(before, a.target))
        await eventually(lambda: a.exporter.departures.counters.bytes > 0)
        await a.exporter.close()
        with pytest.raises(HandoffFailed, match="pod decode-0 is gone"):
            await moving
        await b.empty()
        await ended(before)

    async def test_the_other_pod_stands_still_after_the_freeze(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its acknowledgement does not come: the stream goes on here."""
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._ACK_S", 0.1)
        a = await make_decode(name="decode-0", step_s=0.002)
        b = await make_decode(name="decode-1")
        before = await begun(a, prompt(100), max_tokens=200)
        take_in = importer._take_in

        def stands_still(request_id: str, frames: list[Any], upto: int, engine: Any) -> None:
            if isinstance(frames[-1], wire.Frozen):
                time.sleep(0.5)
                raise HandoffFailed("internal", "it stood still")
            take_in(request_id, frames, upto, engine)

        monkeypatch.setattr(importer, "_take_in", stands_still)
        with pytest.raises(HandoffFailed, match="it stood still"):
            await b.take_over(before, a.target)
        await self.stays(a, before, "not_moved")
        await b.empty()

    async def test_a_stream_that_ends_first(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
        a, b = await make_decode(name="decode-0", step_s=0.002), await make_decode(name="decode-1")
        before = await begun(a, prompt(700), max_tokens=8)
        with pytest.raises(HandoffFailed, match="the stream has ended meanwhile"):
            await b.take_over(before, a.target)
        await self.stays(a, before, "not_moved")
        await b.empty()

    @quick
    async def test_no_room_there(self, make_decode: Make) -> None:
        """The stream is not disturbed by a pod that has no blocks."""
        a = await make_decode(name="decode-0", step_s=0.01)
        b = await make_decode(name="decode-1", blocks=24)
        held = Request("held", prompt(200), Sampling(max_tokens=20))
        await b.worker.call(lambda engine: engine.expect(held))
        assert await b.worker.call(lambda engine: engine.grant("held", 200)) is not None
        before = await begun(a, prompt(100), max_tokens=150)
        with pytest.raises(HandoffFailed, match="had no room for 1 s"):
            await b.take_over(before, a.target)
        assert a.exporter.departures.counters.bytes == 0
        await b.worker.call(lambda engine: engine.abort("held"))
        assert await ended(before) == "length"

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"secret": b"another"}, "the handoff secrets of the two pods differ"),
            ({"layout": {"revision": "r2"}}, "KV caches differ in revision"),
            ({"layout": {"dtype": "bfloat16"}}, "KV caches differ in dtype"),
        ],
    )
    async def test_pods_that_do_not_belong_together(
        self, make_decode: Make, options: dict[str, Any], sentence: str
    ) -> None:
        a = await make_decode(name="decode-0", step_s=0.002, **options)
        b = await make_decode(name="decode-1")
        before = await begun(a, prompt(50), max_tokens=50)
        with pytest.raises(HandoffFailed, match=sentence):
            await b.take_over(before, a.target)
        assert await ended(before) == "length"
        assert before.ids == continuation(prompt(50), 50)
        await b.empty()

    async def test_a_stream_that_does_not_run_there(self, make_decode: Make) -> None:
        a, b = await make_decode(name="decode-0"), await make_decode(name="decode-1")
        before = await begun(b, prompt(50), max_tokens=5)
        await ended(before)
        before.ask.output_ids.clear()
        before.tokens = before.tokens[:2]
        with pytest.raises(HandoffFailed, match="unknown here"):
            await b.take_over(before, a.target)

    async def test_a_prefill_pod_decodes_nothing(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, a = await make_prefill(), await make_decode(name="decode-1", step_s=0.01)
        before = await begun(a, prompt(50), max_tokens=30)
        with pytest.raises(HandoffFailed, match="this pod decodes nothing"):
            await a.take_over(before, prefill.target)
        await ended(before)

    async def test_a_newer_attempt_ends_the_older_one(
        self, make_decode: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tandem_runtime.kv.handoff.departure._VISIT_BYTES", 1)
        a = await make_decode(name="decode-0", step_s=0.05)
        b, c = await make_decode(name="decode-1"), await make_decode(name="decode-2")
        before = await begun(a, prompt(700), max_tokens=300)
        first = asyncio.create_task(b.take_over(before, a.target))
        await eventually(lambda: a.exporter.departures.counters.bytes > 0)
        before.ask = msgspec.structs.replace(before.ask, epoch=4)
        second = await c.take_over(before, a.target)
        with pytest.raises(HandoffFailed, match="a newer attempt of the stream runs"):
            await first
        assert await ended(before) == "decode-2"
        assert await ended(second) == "length"
        assert second.ask.output_ids + second.ids == continuation(prompt(700), 300)
