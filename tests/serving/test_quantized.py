"""Pods with weights of int4 and KV of fp8: handed over, and alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem_runtime.contract import Role

FLAGS = ("--dtype", "bfloat16", "--weights", "int4", "--kv-cache", "fp8")


def test_split_and_aggregated_pods_agree_token_for_token(
    gateway: Any, start_pod: Any, traced_chat: Callable[..., dict[str, Any]]
) -> None:
    roles = {"quantized-p": Role.PREFILL, "quantized-d": Role.DECODE, "quantized-b": Role.BOTH}
    pods = [start_pod(name, role, *FLAGS, wait=False) for name, role in roles.items()]
    prefill, decode, both = (pod.wait_ready() for pod in pods)
    gateway.show(prefill.view(), decode.view())
    prompt = "Write one sentence about the sea. " * 12
    split = traced_chat(gateway.url, prompt, logprobs=True, top_logprobs=0)
    alone = traced_chat(both.url, prompt, logprobs=True, top_logprobs=0)
    assert split["choices"] == alone["choices"], "text and every token's log probability"
    token_bytes = 30 * 2 * 3 * 64  # layers, k|v, kv heads, head dim
    trace = split["tandem"]
    assert trace["handoff_bytes"] == trace["handoff_tokens"] * token_bytes > 0
