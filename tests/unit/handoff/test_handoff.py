"""The handoff between two engines over real sockets: what it moves, and that nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from handoff_ends import ask, eventually, ids, quick
from hash_engine import LAYOUT, VOCAB_SIZE, continuation
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv.handoff.exporter import Refusal
from tandem_runtime.kv.handoff.link import HandoffFailed
from tandem_runtime.protocol import Sampling

Make = Callable[..., Any]


def prompt(tokens: int, salt: int = 0) -> list[int]:
    return [(7 * n + salt) % VOCAB_SIZE for n in range(tokens)]


class TestTokens:
    @pytest.mark.parametrize("tokens", [1, 15, 16, 31, 32, 33, 64, 65, 200, 500])
    async def test_any_length(self, make_prefill: Make, make_decode: Make, tokens: int) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        outputs = await decode.generate(ask(prompt(tokens), prefill.target))
        assert ids(outputs) == continuation(prompt(tokens), 5)
        assert outputs[-1].finish_reason == "length"
        assert decode.importer.counters.bytes == tokens * LAYOUT.token_bytes
        assert prefill.exporter.counters.bytes == tokens * LAYOUT.token_bytes

    async def test_many_streams_share_a_connection(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill = await make_prefill(blocks=200, step_s=0.002)
        decode = await make_decode(blocks=200, step_s=0.002)
        prompts = [prompt(20 * n + 5, salt=n) for n in range(10)]
        streams = await asyncio.gather(
            *(
                decode.generate(ask(p, prefill.target, stream=f"s{n}"))
                for n, p in enumerate(prompts)
            )
        )
        assert [ids(outputs) for outputs in streams] == [continuation(p, 5) for p in prompts]

    async def test_more_streams_than_either_pool_holds(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        """Grants wait for blocks; nobody starves, nobody is lost."""
        prefill, decode = await make_prefill(blocks=12), await make_decode(blocks=12)
        prompts = [prompt(100, salt=n) for n in range(8)]
        streams = await asyncio.gather(
            *(
                decode.generate(ask(p, prefill.target, stream=f"s{n}"))
                for n, p in enumerate(prompts)
            )
        )
        assert [ids(outputs) for outputs in streams] == [continuation(p, 5) for p in prompts]

    @pytest.mark.parametrize("shared", [16, 48, 96, 112])
    async def test_what_the_decode_pod_holds_is_not_sent(
        self, make_prefill: Make, make_decode: Make, shared: int
    ) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        first = prompt(shared) + prompt(20, salt=3)
        second = prompt(shared) + prompt(30, salt=5)
        await decode.generate(ask(first, prefill.target, stream="a"))
        before = decode.importer.counters.bytes
        outputs = await decode.generate(ask(second, prefill.target, stream="b"))
        assert ids(outputs) == continuation(second, 5)
        moved = decode.importer.counters.bytes - before
        assert moved == (len(second) - shared) * LAYOUT.token_bytes

    async def test_a_prompt_that_is_all_there(self, make_prefill: Make, make_decode: Make) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        same = prompt(64)
        for stream in ("a", "b"):
            outputs = await decode.generate(ask(same, prefill.target, stream=stream))
            assert ids(outputs) == continuation(same, 5)
        assert decode.importer.counters.bytes == 64 * LAYOUT.token_bytes

    async def test_a_resumed_stream_goes_on_where_it_was(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        whole = continuation(prompt(40), 10)
        resumed = ask(prompt(40), prefill.target, epoch=1, max_tokens=10, output_ids=whole[:4])
        assert ids(await decode.generate(resumed)) == whole[4:]

    async def test_a_stream_that_had_ended(self, make_prefill: Make, make_decode: Make) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        whole = continuation(prompt(40), 3)
        resumed = ask(prompt(40), prefill.target, max_tokens=3, output_ids=whole)
        request = Request("s#0", resumed.prompt_ids, resumed.sampling, whole)
        assert await decode.importer.receive(request, resumed) == "length"

    async def test_one_token(self, make_prefill: Make, make_decode: Make) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        outputs = await decode.generate(ask(prompt(40), prefill.target, max_tokens=1))
        assert ids(outputs) == continuation(prompt(40), 1)

    async def test_logprobs_of_the_first_token_travel(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        outputs = await decode.generate(ask(prompt(40), prefill.target, logprobs=2))
        for output in outputs:
            assert output.token.logprob is not None
            assert len(output.token.top_logprobs) == 2

    async def test_what_is_reported(self, make_prefill: Make, make_decode: Make) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        await decode.generate(ask(prompt(100), prefill.target, stream="a"))
        other = ask([*prompt(100), 1, 2], prefill.target, stream="b", tenant="someone else")
        request = Request("b#0", other.prompt_ids, other.sampling)
        imported = await decode.importer.receive(request, other)
        await decode.worker.call(lambda engine: engine.abort("b#0"))
        assert imported.cached_tokens == 0, "caches are not shared between tenants"
        third = ask([*prompt(100), 1, 2], prefill.target, stream="c")
        request = Request("c#0", third.prompt_ids, third.sampling, cache_salt="unshared here")
        imported = await decode.importer.receive(request, third)
        await decode.worker.call(lambda engine: engine.abort("c#0"))
        assert imported.cached_tokens == 96, "of the prefill pod's cache"
        assert imported.handoff.prefill_pod == "prefill-0"
        assert imported.handoff.tokens == 102
        assert imported.handoff.bytes == 102 * LAYOUT.token_bytes
        assert 0 <= imported.handoff.duration_s < 1
        assert 0 <= imported.queue_s < 1


class TestRefusals:
    @pytest.mark.parametrize("code", ["draining", "overloaded"])
    async def test_a_prefill_pod_that_admits_nothing(
        self, make_prefill: Make, make_decode: Make, code: str
    ) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        prefill.refusal.append(Refusal(code, "not now"))
        with pytest.raises(HandoffFailed, match="not now") as failure:
            await decode.generate(ask(prompt(10), prefill.target))
        assert (failure.value.code, failure.value.retryable) == (code, True)

    async def test_a_request_that_the_prefill_pod_can_never_serve(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, decode = await make_prefill(blocks=4), await make_decode()
        with pytest.raises(HandoffFailed, match="64 tokens that this pod's KV") as failure:
            await decode.generate(ask(prompt(100), prefill.target))
        assert (failure.value.code, failure.value.retryable) == ("bad_request", False)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"secret": b"another"}, "the handoff secrets of the two pods differ"),
            ({"secret": b""}, "the handoff secrets of the two pods differ"),
            ({"layout": {"revision": "r2"}}, "KV caches differ in revision"),
            ({"layout": {"dtype": "bfloat16"}}, "KV caches differ in dtype"),
            ({"name": "prefill-7"}, "this is pod prefill-7, not prefill-0"),
        ],
    )
    async def test_pods_that_do_not_belong_together(
        self, make_prefill: Make, make_decode: Make, options: dict[str, Any], sentence: str
    ) -> None:
        prefill, decode = await make_prefill(**options), await make_decode()
        with pytest.raises(HandoffFailed, match=sentence) as failure:
            await decode.generate(ask(prompt(10), prefill.target))
        assert (failure.value.code, failure.value.retryable) == ("prefill_lost", True)

    async def test_nobody_at_the_address(self, make_prefill: Make, make_decode: Make) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        await prefill.exporter.close()
        with pytest.raises(HandoffFailed, match="no KV from pod prefill-0") as failure:
            await decode.generate(ask(prompt(10), prefill.target))
        assert failure.value.code == "prefill_lost"

    async def test_a_newer_attempt_ends_the_older_one(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill = await make_prefill(step_s=0.05)
        one, two = await make_decode(name="decode-0"), await make_decode(name="decode-1")
        older = asyncio.create_task(one.generate(ask(prompt(300), prefill.target, epoch=1)))
        await eventually(lambda: prefill.exporter.streams.total == 1)
        newer = asyncio.create_task(two.generate(ask(prompt(300), prefill.target, epoch=2)))
        with pytest.raises(HandoffFailed, match="a newer attempt of the stream runs"):
            await older
        with pytest.raises(HandoffFailed, match="a newer attempt than s#0 runs here"):
            await one.generate(ask(prompt(300), prefill.target, epoch=0))
        assert ids(await newer) == continuation(prompt(300), 5)


class TestLoss:
    async def test_the_prefill_pod_dies_in_mid_transfer(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, decode = await make_prefill(step_s=0.02), await make_decode()
        stream = asyncio.create_task(decode.generate(ask(prompt(600), prefill.target)))
        await eventually(lambda: prefill.exporter.counters.bytes > 0)
        await prefill.exporter.close()
        with pytest.raises(HandoffFailed, match="pod prefill-0 is gone") as failure:
            await asyncio.wait_for(stream, 20)
        assert (failure.value.code, failure.value.retryable) == ("prefill_lost", True)
        await decode.empty()
        await prefill.empty()

    async def test_after_a_loss_the_next_stream_connects_again(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, decode = await make_prefill(), await make_decode()
        await decode.generate(ask(prompt(10), prefill.target, stream="a"))
        for session in list(prefill.exporter._sessions):
            session.connection.abort("cut")
        await asyncio.sleep(0.1)
        outputs = await decode.generate(ask(prompt(10), prefill.target, stream="b"))
        assert ids(outputs) == continuation(prompt(10), 5)

    async def test_the_decode_pod_dies_in_mid_transfer(
        self, make_prefill: Make, make_decode: Make
    ) -> None:
        prefill, decode = await make_prefill(step_s=0.02), await make_decode()
        stream = asyncio.create_task(decode.generate(ask(prompt(600), prefill.target)))
        await eventually(lambda: prefill.exporter.counters.bytes > 0)
        await decode.importer.close()
        with pytest.raises(HandoffFailed):
            await stream
        await asyncio.wait_for(prefill.empty(), 20)

    @pytest.mark.parametrize("wait_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.2])
    async def test_a_caller_that_leaves_at_any_moment(
        self, make_prefill: Make, make_decode: Make, wait_s: float
    ) -> None:
        prefill, decode = await make_prefill(step_s=0.01), await make_decode(step_s=0.01)
        stream = asyncio.create_task(decode.generate(ask(prompt(600), prefill.target)))
        await asyncio.sleep(wait_s)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        await decode.worker.call(lambda engine: engine.abort("s#0"))
        await decode.empty()
        await prefill.empty()
        outputs = await decode.generate(ask(prompt(40), prefill.target, epoch=1))
        assert ids(outputs) == continuation(prompt(40), 5)

    @quick
    async def test_no_room_in_the_decode_pod(self, make_prefill: Make, make_decode: Make) -> None:
        prefill, decode = await make_prefill(), await make_decode(blocks=8)
        held = Request("held", prompt(100), Sampling(max_tokens=20))
        await decode.worker.call(lambda engine: engine.expect(held))
        assert await decode.worker.call(lambda engine: engine.grant("held", 100)) is not None
        with pytest.raises(HandoffFailed, match="had no room for 1 s") as failure:
            await decode.generate(ask(prompt(90), prefill.target))
        assert (failure.value.code, failure.value.retryable) == ("overloaded", True)
        await decode.worker.call(lambda engine: engine.abort("held"))
