"""Several choices of one prompt: streams of their own, each with its journal."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from hash_engine import continuation
from hash_pods import MakePod, Served
from tandem_runtime.contract import Role
from tandem_runtime.frontend.parameters import reseeded
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.protocol import Sampling

TEXT = "The quick brown fox jumps over the lazy dog. " * 2
ASK: dict[str, Any] = {"model": "hash", "prompt": TEXT, "seed": 5, "n": 3}


def expected(served: Served, count: int) -> dict[int, str]:
    """Each choice's text, by its index."""
    tokenizer = Tokenizer(served.pod.bundle)
    ids = tokenizer.encode(TEXT)
    sampling = Sampling(max_tokens=1, seed=5)
    seeds = [5, *(reseeded(sampling, n).seed for n in (1, 2))]
    return {n: tokenizer.decode(continuation(ids, count, s)) for n, s in enumerate(seeds)}


async def test_the_prompt_is_computed_once(front: Any, make_pod: MakePod) -> None:
    pod = await make_pod()
    front.discovery.show(pod.view())
    answer = await front.client.completions.create(**ASK, max_tokens=20)
    assert {c.index: c.text for c in answer.choices} == expected(pod, 20)
    tokens = len(Tokenizer(pod.pod.bundle).encode(TEXT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 60)
    stats = pod.pod.worker.stats
    assert stats is not None
    assert stats.prompt_tokens == 3 * tokens
    assert stats.prompt_tokens - stats.cached_tokens < tokens + 2 * 16, "the last block, each"


async def test_each_choice_moves_when_its_pod_dies(front: Any, make_pod: MakePod) -> None:
    prefill = await make_pod(role=Role.PREFILL, pod="prefill-0", step_s=0.02)
    one, two = [await make_pod(role=Role.DECODE, pod=f"d-{n}", step_s=0.02) for n in range(2)]
    front.discovery.show(prefill.view(), one.view(), two.view(leaving=True))
    texts: dict[int, str] = {}
    all_run = asyncio.Event()

    async def read() -> None:
        stream = await front.client.completions.create(**ASK, max_tokens=60, stream=True)
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
            if len(texts) == 3:
                all_run.set()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(all_run.wait(), 20)
    front.discovery.show(prefill.view(), one.view(), two.view())
    await one.end()
    await asyncio.wait_for(reading, 30)
    assert texts == expected(two, 60)
    await two.empty()


async def test_a_client_that_leaves_ends_all_of_them(front: Any, make_pod: MakePod) -> None:
    pod = await make_pod(step_s=0.02)
    front.discovery.show(pod.view())
    stream = await front.client.completions.create(**ASK, max_tokens=500, stream=True)
    seen = set()
    async for chunk in stream:
        seen |= {choice.index for choice in chunk.choices}
        if len(seen) == 3:
            break
    await stream.close()
    await pod.empty()
    assert front.gateway.backend.streams == 0


async def test_full_queues_are_503_with_retry_after(front: Any, make_pod: MakePod) -> None:
    pod = await make_pod(step_s=1.0, max_waiting=1)
    front.discovery.show(pod.view())
    first = asyncio.create_task(
        front.client.completions.create(model="hash", prompt=TEXT, max_tokens=2)
    )
    while pod.pod.streams.waiting < 1:  # noqa: ASYNC110 - what is awaited here has no event
        await asyncio.sleep(0.01)
    reply = await pod.http.post("/v1/completions", json={"model": "hash", "prompt": "x"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "1 streams wait on this pod already."
    with pytest.raises(openai.InternalServerError, match="can serve now") as full:
        await front.client.completions.create(model="hash", prompt="x")
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "5"
    await first
