"""Streams that outlive the connection they were asked for on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
from hash_engine import continuation
from hash_pods import PROMPT, ask, collect, events, eventually, ids
from tandem_runtime import contract
from tandem_runtime.protocol import HeldStream, HeldStreams

Make = Callable[..., Any]
LONG = 100


def kept_ask(**fields: Any) -> Any:
    return ask(stream="a.0", journal=b"what the gateway needs", **fields)


async def found(pod: Any, answer: str = "a") -> list[HeldStream]:
    reply = await pod.http.get(f"{contract.PATH_STREAMS}/{answer}")
    assert reply.status_code == 200
    return list(msgspec.json.decode(reply.content, type=HeldStreams).streams)


async def cancel(pod: Any, epoch: int) -> None:
    reply = await pod.http.delete(f"{contract.PATH_STREAMS}/a.0", params={"epoch": epoch})
    assert reply.status_code == 204


class Hold:
    """Between two steps of a pod's engine, so that what runs still does when it is looked at."""

    def __init__(self, pod: Any) -> None:
        self._pod = pod
        self._released = threading.Event()
        pod.runner.before_step = lambda batch: self._released.wait()

    def release(self) -> None:
        self._released.set()

    async def taken_over(self, epoch: int) -> None:
        """Holds until the stream is that attempt's."""
        await eventually(lambda: self._pod.pod.kept._streams["a.0"].epoch == epoch)
        self.release()


async def begin_and_break(pod: Any, tokens: int = 3, **fields: Any) -> tuple[list[int], Hold]:
    """What came before the connection broke; the pod stands still."""
    received: list[int] = []
    async with aclosing(events(pod, kept_ask(max_tokens=LONG, **fields))) as stream:
        async for event in stream:
            received += event.token_ids
            if len(received) >= tokens:
                break
        hold = Hold(pod)
    await eventually(lambda: pod.pod.kept.held == 1)
    return received, hold


async def collect_on(pod: Any, hold: Hold, request: Any) -> Any:
    """The events of an attempt that takes the stream over."""
    collecting = asyncio.create_task(collect(pod, request))
    await hold.taken_over(request.epoch)
    return await collecting


class TestABrokenConnection:
    async def test_the_stream_goes_on_and_another_attempt_has_the_rest(
        self, make_pod: Make
    ) -> None:
        pod = await make_pod(step_s=0.01)
        received, hold = await begin_and_break(pod)
        [held] = await found(pod)
        assert held.request.journal == b"what the gateway needs"
        assert held.request.prompt_ids == PROMPT
        known = list(held.so_far.token_ids)
        assert known[: len(received)] == received
        again = kept_ask(epoch=7, max_tokens=LONG, output_ids=known)
        rest = await collect_on(pod, hold, again)
        assert known + ids(rest) == continuation(PROMPT, LONG)
        assert {event.epoch for event in rest} == {7}
        assert pod.pod.worker.stats.arrivals == 1, "it was not computed again"
        assert pod.pod.kept.outcomes == {"resumed": 1}
        await pod.empty()

    async def test_a_stream_that_cannot_be_resumed_ends(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        async with aclosing(events(pod, ask(stream="a.0", max_tokens=LONG))) as stream:
            await anext(stream)
        await pod.empty()
        assert await found(pod) == []

    async def test_its_end_is_kept(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        _, hold = await begin_and_break(pod)
        hold.release()
        await pod.empty()
        [held] = await found(pod)
        assert list(held.so_far.token_ids) == continuation(PROMPT, LONG)
        assert held.so_far.finish_reason == "length"
        known = list(held.so_far.token_ids[:10])
        rest = await collect(pod, kept_ask(epoch=7, max_tokens=LONG, output_ids=known))
        assert known + ids(rest) == continuation(PROMPT, LONG)
        assert rest[-1].finish_reason == "length"

    async def test_it_expires(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01, hold_s=1.0)
        _, hold = await begin_and_break(pod)
        await eventually(lambda: not pod.pod.kept._streams)
        hold.release()
        await pod.empty()
        assert await found(pod) == []
        assert pod.pod.kept.outcomes == {"expired": 1}
        text = (await pod.http.get(contract.PATH_METRICS)).text
        assert 'tandem_stream_holds_total{engine="0",model_name="hash",outcome="expired"}' in text
        assert 'tandem_held_streams{engine="0",model_name="hash"} 0.0' in text

    async def test_log_probabilities_are_kept(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        whole = await collect(pod, ask(max_tokens=40, logprobs=2))
        async with aclosing(events(pod, kept_ask(max_tokens=40, logprobs=2))) as stream:
            await anext(stream)
        rest = await collect(pod, kept_ask(epoch=1, max_tokens=40, logprobs=2))
        for name in ("token_ids", "logprobs", "top_logprobs"):
            values = [[x for e in run for x in getattr(e, name)] for run in (whole, rest)]
            assert values[0] == values[1], name


class TestFences:
    async def test_the_older_attempt_is_cut_off(self, make_pod: Make) -> None:
        """Its gateway was stopped, not killed: its connection is still there."""
        pod = await make_pod(step_s=0.01)
        older = events(pod, kept_ask(max_tokens=LONG))
        async with aclosing(older):
            first = await anext(older)
            again = kept_ask(epoch=5, max_tokens=LONG, output_ids=list(first.token_ids))
            newer = await collect_on(pod, Hold(pod), again)
            seen = [event async for event in older]
        assert list(first.token_ids) + ids(newer) == continuation(PROMPT, LONG)
        assert (seen[-1].error_code, seen[-1].retryable) == ("superseded", False)
        await cancel(pod, 0)
        [held] = await found(pod)
        assert held.so_far.finish_reason == "length", "the older gateway has no say"
        [refused] = await collect(pod, kept_ask(epoch=4, max_tokens=LONG))
        assert (refused.error_code, refused.retryable) == ("superseded", False)

    async def test_no_older_attempt_moves_it_away(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        _, hold = await begin_and_break(pod)
        async with aclosing(events(pod, kept_ask(epoch=9, max_tokens=LONG))) as stream:
            await anext(stream)
            refusal = pod.pod.streams.find("a.0", 2)
            assert "newer attempt" in refusal.reason
            assert not hasattr(pod.pod.streams.find("a.0", 10), "reason")
            hold.release()


class TestClientsThatLeave:
    async def test_the_gateway_says_so(self, make_pod: Make) -> None:
        pod = await make_pod(step_s=0.01)
        _, hold = await begin_and_break(pod)
        await cancel(pod, 0)
        hold.release()
        await pod.empty()
        assert pod.pod.kept.outcomes == {"cancelled": 1}
        [held] = await found(pod)
        assert held.so_far.finish_reason is None, "what came of it is still there"

    async def test_before_its_first_token_nobody_can_come_back(self, make_pod: Make) -> None:
        pod = await make_pod()
        hold = Hold(pod)
        asking = asyncio.create_task(collect(pod, kept_ask(max_tokens=LONG)))
        await eventually(lambda: pod.pod.streams.waiting == 1)
        asking.cancel()
        await eventually(lambda: pod.pod.streams.waiting == 0)
        hold.release()
        await pod.empty()
        assert await found(pod) == []


async def test_memory_is_bounded(make_pod: Make) -> None:
    pod = await make_pod()
    pod.pod.kept._most_streams = 3
    for n in range(6):
        await collect(pod, ask(stream=f"b.{n}", journal=b"j"))
    await eventually(lambda: len(pod.pod.kept._streams) == 3)
    kept = [held.request.stream_id for held in await found(pod, "b")]
    assert kept == ["b.3", "b.4", "b.5"]
    pod.pod.kept._most_streams, pod.pod.kept._most_bytes = 100, 1
    await collect(pod, ask(stream="b.9", journal=b"j"))
    await eventually(lambda: not pod.pod.kept._streams)
    assert pod.pod.kept._unread_bytes == 0


async def test_another_beginning_is_another_stream(make_pod: Make) -> None:
    """What a gateway knows of a stream counts, not what the pod has of it."""
    pod = await make_pod(step_s=0.01)
    _, hold = await begin_and_break(pod)
    hold.release()
    other = [1, 2, 3]
    rest = await collect(pod, kept_ask(epoch=1, max_tokens=20, output_ids=other))
    assert ids(rest) == continuation([*PROMPT, *other], 17)
    await pod.empty()


async def test_strangers_are_refused(make_pod: Make) -> None:
    pod = await make_pod()
    for method in ("GET", "DELETE"):
        path = f"{contract.PATH_STREAMS}/a?epoch=0"
        reply = await pod.http.request(method, path, headers={"authorization": "Bearer x"})
        assert reply.status_code == 403
