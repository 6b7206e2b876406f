"""A model whose output is not a number: the stream ends at once, on one pod and on a pair."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hash_engine import continuation
from hash_pods import PROMPT, Served, ask, collect, ids
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.protocol import GenerateEvent, GenerateRequest

Make = Callable[..., Any]
LONG_PROMPT = [n % 256 for n in range(600)]
SENTENCE = "the model's output for this stream is not a number"


def spoil(served: Served, position: int) -> None:
    """Whatever token is due at this position, the model gives none."""
    served.runner.not_finite = lambda sample: sample.position == position


async def ends(served: Served, request: GenerateRequest) -> list[GenerateEvent]:
    """The stream's events; the last one says what happened, and that no other pod helps."""
    received = await asyncio.wait_for(collect(served, request), 30)
    last = received[-1]
    assert (last.error_code, last.retryable, last.finish_reason) == ("not_finite", False, None)
    assert SENTENCE in (last.error or "")
    return received


@pytest.mark.parametrize("tokens", [0, 1, 3])
async def test_on_one_pod(make_pod: Make, tokens: int) -> None:
    pod = await make_pod()
    spoil(pod, len(PROMPT) + tokens)
    received = await ends(pod, ask())
    assert ids(received) == continuation(PROMPT, tokens)
    await pod.empty()
    other = await collect(pod, ask(PROMPT[:20], stream="t"))
    assert ids(other) == continuation(PROMPT[:20], 5), "other streams go on"
    metrics = (await pod.http.get(contract.PATH_METRICS)).text
    labels = 'engine="0",finished_reason="length",model_name="hash"'
    assert f"vllm:request_success_total{{{labels}}} 1.0" in metrics, "one of the two"


async def test_a_client_of_the_pod_is_told(make_pod: Make) -> None:
    pod = await make_pod()
    spoil(pod, 4)
    body = {"model": "hash", "prompt": "four", "max_tokens": 3}
    reply = await pod.http.post("/v1/completions", json=body, timeout=30)
    assert reply.status_code == 500
    assert SENTENCE[4:] in reply.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["one chunk", "many chunks"])
async def test_on_the_prefill_pod(make_pod: Make, prompt: list[int]) -> None:
    prefill = await make_pod(role=Role.PREFILL, pod="prefill-0")
    decode = await make_pod(role=Role.DECODE, pod="decode-0")
    spoil(prefill, len(prompt))
    [event] = await ends(decode, ask(prompt, prefill=prefill.target))
    assert event.failed_pod == "prefill-0"
    await prefill.empty()
    await decode.empty()
    assert (await prefill.state()).in_flight == 0
    for pod, direction in ((prefill, "sent"), (decode, "received")):
        text = (await pod.http.get(contract.PATH_METRICS)).text
        labels = f'direction="{direction}",engine="0",model_name="hash",reason="not_finite"'
        assert f"tandem_handoff_failures_total{{{labels}}} 1.0" in text


@pytest.mark.parametrize("tokens", [1, 3])
async def test_on_the_decode_pod(make_pod: Make, tokens: int) -> None:
    prefill = await make_pod(role=Role.PREFILL, pod="prefill-0")
    decode = await make_pod(role=Role.DECODE, pod="decode-0")
    spoil(decode, len(PROMPT) + tokens)
    received = await ends(decode, ask(prefill=prefill.target))
    assert ids(received) == continuation(PROMPT, tokens)
    assert received[-1].failed_pod is None
    await decode.empty()
    await prefill.empty()
