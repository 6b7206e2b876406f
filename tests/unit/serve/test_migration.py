"""A stream that another pod takes over, as those who ask the two pods see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hash_engine import continuation
from hash_pods import PROMPT, MakePod, Served, ask, collect, events, eventually, ids, serving_pods
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.protocol import GenerateEvent


@pytest.fixture
async def make_pod() -> AsyncIterator[MakePod]:
    async with serving_pods() as make:
        yield make


class Streaming:
    """An attempt whose events are read as they come."""

    def __init__(self, served: Served, **fields: Any) -> None:
        self.received: list[GenerateEvent] = []
        self.task = asyncio.create_task(self._read(served, ask(**fields)))

    async def _read(self, served: Served, request: Any) -> None:
        async for event in events(served, request):
            self.received.append(event)

    @property
    def ids(self) -> list[int]:
        return ids(self.received)

    async def has(self, tokens: int) -> None:
        await eventually(lambda: len(self.ids) >= tokens)


@pytest.mark.parametrize("roles", [(Role.DECODE, Role.DECODE), (Role.BOTH, Role.BOTH)])
async def test_the_events_of_a_move(make_pod: MakePod, roles: tuple[Role, Role]) -> None:
    a = await make_pod(role=roles[0], pod="a", step_s=0.005)
    b = await make_pod(role=roles[1], pod="b", step_s=0.005)
    first = Streaming(a, max_tokens=200)
    await first.has(5)
    known = list(first.ids)
    second = await collect(b, ask(epoch=1, max_tokens=200, output_ids=known, take_from=a.target))
    await first.task
    end = first.received[-1]
    assert (end.error_code, end.error) == ("moved", "this stream goes on on pod b")
    assert end.retryable
    assert second[0].taken_over
    assert not any(event.taken_over for event in second[1:])
    assert first.ids == known + list(second[0].token_ids)
    assert known + ids(second) == continuation(PROMPT, 200)
    assert second[-1].finish_reason == "length"
    await a.empty()
    await b.empty()


async def test_log_probabilities_are_those_of_one_stream(make_pod: MakePod) -> None:
    a, b = await make_pod(pod="a", step_s=0.005), await make_pod(pod="b")
    first = Streaming(a, max_tokens=60, logprobs=2)
    await first.has(3)
    known = list(first.ids)
    asked = ask(epoch=1, max_tokens=60, output_ids=known, take_from=a.target, logprobs=2)
    moved = await collect(b, asked)
    alone = await collect(b, ask(stream="alone", max_tokens=60, logprobs=2))

    def logprobs(received: list[GenerateEvent]) -> list[Any]:
        return [
            pair
            for event in received
            for pair in zip(event.logprobs, event.top_logprobs, strict=True)
        ]

    assert logprobs(moved) == logprobs(alone)[len(known) :]
    await first.task


async def test_what_the_metrics_say(make_pod: MakePod) -> None:
    a, b = await make_pod(pod="a", step_s=0.005), await make_pod(pod="b")
    first = Streaming(a, max_tokens=100)
    await first.has(5)
    asked = ask(epoch=1, max_tokens=100, output_ids=first.ids, take_from=a.target)
    await collect(b, asked)
    await first.task
    left = (await a.http.get(contract.PATH_METRICS)).text
    came = (await b.http.get(contract.PATH_METRICS)).text
    labels = 'engine="0",model_name="hash"'
    out = '{direction="out",engine="0",model_name="hash",outcome="moved"} 1.0'
    assert f"tandem_migrations_total{out}" in left
    assert f"tandem_migration_pause_seconds_count{{{labels}}} 1.0" in left
    assert f"tandem_request_failures_total{{{labels}}}" not in left
    assert "tandem_migrations_total" + out.replace('"out"', '"in"') in came
    assert 'vllm:request_success_total{engine="0",finished_reason="length"' in came
    assert "vllm:request_success_total{" not in left, "its end is counted where it was"
    assert f"vllm:time_to_first_token_seconds_count{{{labels}}} 1.0" in left
    assert f"vllm:time_to_first_token_seconds_count{{{labels}}}" not in came


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stream": "unknown"}, "stream unknown is not decoded on this pod"),
        ({"epoch": 0}, "stream s runs here in a newer attempt"),
    ],
)
async def test_a_stream_that_does_not_move(
    make_pod: MakePod, fields: dict[str, Any], sentence: str
) -> None:
    a, b = await make_pod(pod="a", step_s=0.005), await make_pod(pod="b")
    first = Streaming(a, max_tokens=60)
    await first.has(3)
    fields = {"epoch": 1, "output_ids": first.ids, "take_from": a.target, **fields}
    [refused] = await collect(b, ask(max_tokens=60, **fields))
    assert (refused.error_code, refused.error, refused.retryable) == ("not_moved", sentence, True)
    await first.task
    assert first.ids == continuation(PROMPT, 60)
    await b.empty()


async def test_whoever_left_while_it_moved_has_left(make_pod: MakePod) -> None:
    a, b = await make_pod(pod="a", step_s=0.005), await make_pod(pod="b", step_s=0.005)
    first = Streaming(a, max_tokens=900)
    await first.has(5)
    asked = ask(epoch=1, max_tokens=900, output_ids=first.ids, take_from=a.target)
    second = asyncio.create_task(collect(b, asked))
    await asyncio.sleep(0.02)
    first.task.cancel()
    second.cancel()
    await asyncio.gather(first.task, second, return_exceptions=True)
    await a.empty()
    await b.empty()


async def test_a_draining_pod_takes_none_and_gives_all(make_pod: MakePod) -> None:
    a, b = await make_pod(pod="a", step_s=0.005), await make_pod(pod="b", step_s=0.005)
    first = Streaming(a, max_tokens=300)
    await first.has(5)
    b.pod.lifecycle.drain()
    asked = ask(epoch=1, max_tokens=300, output_ids=first.ids, take_from=a.target)
    [refused] = await collect(b, asked)
    assert refused.error_code == "draining"
    b.pod.lifecycle.undo_drain()
    a.pod.lifecycle.stop()
    known = first.ids
    asked = ask(epoch=2, max_tokens=300, output_ids=known, take_from=a.target)
    moved = await collect(b, asked)
    assert known + ids(moved) == continuation(PROMPT, 300)
    await a.empty()
