"""A conversation's next turn, prefilled elsewhere, goes on from what the decode pod generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pod_metrics import metric
from stores import ValkeyServer, valkey_server
from tandem_runtime.contract import Role

NAME = "smollm2-135m"
QUESTION = "Why is the sky blue? Explain it to a child in a few words. " * 28
PAGE = 256


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


def chat(gateway: Any, *messages: str) -> tuple[str, dict[str, Any]]:
    """The answer to a conversation, and its `usage`."""
    turns = [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(messages)
    ]
    body = {"model": NAME, "messages": turns, "max_tokens": 96, "temperature": 0}
    reply = httpx.post(
        f"{gateway.url}/v1/chat/completions", json=body | {"ignore_eos": True}, timeout=240
    )
    assert reply.status_code == 200, reply.text
    found = reply.json()
    return found["choices"][0]["message"]["content"], found["usage"]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def test_what_a_decode_pod_generated_is_not_computed_again(
    start_pod: Any, gateway: Any, server: ValkeyServer
) -> None:
    # Pods that know each other's pages by the store alone: nothing is asked of peers.
    flags = ("--remote-tier-uri", server.uri)
    prefill = start_pod("prefill-t", Role.PREFILL, *flags, wait=False)
    decode = start_pod("decode-t", Role.DECODE, *flags, wait=False)
    prefill.wait_ready(), decode.wait_ready()
    gateway.show(prefill.view(), decode.view())
    answer, usage = chat(gateway, QUESTION)
    first_tokens = usage["prompt_tokens"] + usage["completion_tokens"] - 1
    pages = first_tokens // PAGE
    # Without what decode steps made of it the last page would not be whole.
    assert usage["prompt_tokens"] // PAGE < pages, usage

    def stored() -> float:
        pods = (prefill, decode)
        return sum(metric(p.url, "tandem_tier_pages_total", '"remote"', '"stored"') for p in pods)

    until(lambda: stored() == pages, "the pages do not reach the store")
    _, usage = chat(gateway, QUESTION, answer, "And at night?")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= pages * PAGE, usage
    decoded = metric(prefill.url, "tandem_tier_decoded_hit_tokens_total", '"remote"')
    assert decoded == PAGE
