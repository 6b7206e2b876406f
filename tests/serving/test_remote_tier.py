"""Pods that share KV by way of a Valkey server, and lose it, each other and themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from stores import ValkeyServer, valkey_server
from tandem_runtime.contract import Role

NAME = "smollm2-135m"
PROMPT = [1 + (7 * n) % 900 for n in range(300)]
CACHED = 256
"""A page; the second is not full."""


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


def answer(pod: Any, prompt: list[int]) -> tuple[str, int]:
    """Text, and how many tokens of the prompt were cached."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{pod.url}/v1/completions", json=body, timeout=240)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    details = found["usage"].get("prompt_tokens_details") or {}
    return found["choices"][0]["text"], details.get("cached_tokens", 0)


def metrics(pod: Any, tier: str = "remote") -> dict[str, float]:
    """Of one tier, by name and further label."""
    found = {}
    for line in httpx.get(f"{pod.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("tandem_tier_") and f'tier="{tier}"' in line:
            name, _, value = line.rpartition(" ")
            what = [w.split('"')[1] for w in name.split(",") if w.startswith(("reason", "what"))]
            found[" ".join([name.split("{")[0].removeprefix("tandem_tier_"), *what])] = float(value)
    return found


def wait_stored(pod: Any, pages: int) -> None:
    deadline_s = time.monotonic() + 60
    while metrics(pod)["pages_total stored"] < pages:
        assert time.monotonic() < deadline_s, metrics(pod)
        time.sleep(0.05)


def test_two_pods_share_pages_and_a_new_pod_finds_them_after_all_were_killed(
    start_pod: Any, server: ValkeyServer
) -> None:
    flags = ("--remote-tier-uri", server.uri)
    one = start_pod("both-0", Role.BOTH, *flags, wait=False)
    two = start_pod("both-1", Role.BOTH, *flags, wait=False)
    one.wait_ready(), two.wait_ready()
    text, cached = answer(one, PROMPT)
    assert cached == 0
    wait_stored(one, 1)
    assert answer(two, PROMPT) == (text, CACHED)
    assert metrics(two)["hit_tokens_total"] == CACHED
    assert metrics(two)["pages_total stored"] == 0
    one.kill(), two.kill()
    again = start_pod("both-2", Role.BOTH, *flags)
    assert answer(again, PROMPT) == (text, CACHED)
    # The server goes; streams do not notice.
    server.stop()
    other = PROMPT[::-1]
    text = answer(again, other)[0]
    assert metrics(again)["available"] == 0
    assert metrics(again)["failures_total unreachable"] >= 1
    assert "the remote tier is unreachable, so prompts do without" in again.log.read_text()
    assert answer(again, other) == (text, CACHED)  # the accelerator has it
