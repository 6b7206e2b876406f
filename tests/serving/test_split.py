"""A prefill pod and a decode pod behind a gateway: one request to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tandem_runtime import contract

PROMPTS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea. " * 12,
    "Why is the sky blue? Explain it to a child in a few words. " * 30,
]
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _shown(gateway: Any, split_pods: Any) -> None:
    prefill, decode = split_pods
    gateway.show(prefill.view(), decode.view())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_split_and_aggregated_pods_agree_token_for_token(
    gateway: Any, split_pods: Any, both_pod: Any, traced_chat: Ask, prompt: str
) -> None:
    fields = {"logprobs": True, "top_logprobs": 0}
    split = traced_chat(gateway.url, prompt, **fields)
    alone = traced_chat(both_pod.url, prompt, **fields)
    assert split["choices"] == alone["choices"], "text and every token's log probability"
    trace = split["tandem"]
    assert (trace["prefill_pod"], trace["decode_pod"]) == ("prefill-0", "decode-0")
    assert trace["attempts"] == 1
    assert 0 < trace["handoff_tokens"] <= split["usage"]["prompt_tokens"]
    token_bytes = 30 * 2 * 3 * 64 * 4  # layers, k|v, kv heads, head dim, float32
    assert trace["handoff_bytes"] == trace["handoff_tokens"] * token_bytes
    assert trace["ttft_ms"] > 0


def test_seeded_sampling_agrees_too(gateway: Any, both_pod: Any, traced_chat: Ask) -> None:
    fields = {"temperature": 0.9, "top_p": 0.9, "seed": 1234, "max_tokens": 32}
    split = traced_chat(gateway.url, "Tell me a story.", **fields)
    alone = traced_chat(both_pod.url, "Tell me a story.", **fields)
    assert split["choices"] == alone["choices"]
    other = traced_chat(gateway.url, "Tell me a story.", **{**fields, "seed": 99})
    assert other["choices"] != split["choices"]


def test_the_second_ask_finds_its_prompt_cached(gateway: Any, traced_chat: Ask) -> None:
    prompt = "Repeat after me: one, two, three, four, five, six, seven, eight, nine, ten. " * 8
    first = traced_chat(gateway.url, prompt)
    second = traced_chat(gateway.url, prompt)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 64, (
        "the system prompt at most"
    )
    prompt_tokens = second["usage"]["prompt_tokens"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > prompt_tokens - 32
    assert second["tandem"]["handoff_tokens"] < 32, "what the decode pod holds is not sent again"
    assert second["choices"] == first["choices"]
    salted = traced_chat(gateway.url, prompt, cache_salt="mine alone")
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_client_that_leaves_frees_both_pods(
    gateway: Any, split_pods: Any, chat_body: Callable[..., dict[str, Any]]
) -> None:
    body = chat_body("Count to a thousand.", 1000, stream=True, ignore_eos=True)
    url = f"{gateway.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                break
    for pod in split_pods:
        pod.wait_empty()


def test_metrics_of_a_handoff(gateway: Any, split_pods: Any, traced_chat: Ask) -> None:
    traced_chat(gateway.url, "Hello there.")
    prefill, decode = split_pods
    sent = httpx.get(prefill.url + contract.PATH_METRICS, timeout=10).text
    received = httpx.get(decode.url + contract.PATH_METRICS, timeout=10).text
    assert 'tandem_handoff_bytes_total{direction="sent"' in sent
    assert 'tandem_handoff_bytes_total{direction="received"' in received
    assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="smollm2"}' in received
    front = httpx.get(gateway.url + contract.PATH_METRICS, timeout=10).text
    labels = '{fleet="chat",model_name="smollm2-135m"}'
    assert f"vllm:time_to_first_token_seconds_count{labels}" in front


def test_a_prefill_pod_sends_clients_to_the_gateway(split_pods: Any) -> None:
    prefill, _ = split_pods
    body = {"model": "smollm2-135m", "prompt": "x"}
    reply = httpx.post(f"{prefill.url}/v1/completions", json=body, timeout=10)
    assert reply.status_code == 400
    assert "send requests to the gateway" in reply.json()["error"]["message"]
