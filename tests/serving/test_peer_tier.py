"""A pod that takes a prompt's pages from another one, which a gateway names."""

from __future__ import annotations

import time
from typing import Any

import httpx
from pod_metrics import metric
from tandem_runtime.contract import HEADER_TRACE, Role

NAME = "smollm2-135m"
PROMPT = [1 + (7 * n) % 900 for n in range(300)]
CACHED = 256
"""A page; the second is not full."""


def answer(gateway: Any, prompt: list[int]) -> tuple[str, int, str]:
    """Text, how many tokens of the prompt were cached, and the pod that answered."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    reply = httpx.post(
        f"{gateway.url}/v1/completions", json=body, headers={HEADER_TRACE: "1"}, timeout=240
    )
    assert reply.status_code == 200, reply.text
    found = reply.json()
    details = found["usage"].get("prompt_tokens_details") or {}
    pod = found["tandem"]["decode_pod"]
    return found["choices"][0]["text"], details.get("cached_tokens", 0), pod


def until(url: str, value: float, name: str) -> None:
    deadline_s = time.monotonic() + 60
    while metric(url, name) != value:
        assert time.monotonic() < deadline_s, f"{name} is {metric(url, name)}"
        time.sleep(0.05)


def test_a_pod_answers_with_pages_of_another(start_pod: Any, gateway: Any) -> None:
    one = start_pod("both-0", Role.BOTH, "--peer-tier", wait=False)
    two = start_pod("both-1", Role.BOTH, "--peer-tier", wait=False)
    one.wait_ready(), two.wait_ready()
    gateway.show(one.view())
    until(gateway.url, 0, "tandem_gateway_known_pages")  # those of other tests' pods are forgotten
    text, cached, pod = answer(gateway, PROMPT)
    assert (cached, pod) == (0, "both-0")
    until(gateway.url, 1, "tandem_gateway_known_pages")
    # The first pod leaves: what it holds is still there for the other one.
    gateway.show(one.view(leaving=True), two.view())
    assert answer(gateway, PROMPT) == (text, CACHED, "both-1")
    assert metric(two.url, "tandem_tier_hit_tokens_total", 'tier="peer"') == CACHED
    assert metric(one.url, "tandem_peer_pages_total") == 1
