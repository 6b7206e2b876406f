"""Running streams leave a decode pod that drains: real processes, SmolLM2 in float32."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tandem_runtime import contract
from tandem_runtime.contract import Role

NAME = "smollm2-135m"
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
MAX_TOKENS = 96
LONG_TOKENS = 384
"""Streams that a fast machine, too, still decodes when the last of them has moved."""
Tokens = list[tuple[str, float]]
Undisturbed = Callable[..., list[Tokens]]


class Client:
    """A streamed answer, read in a thread: its tokens with their log probabilities."""

    def __init__(self, url: str, number: int, sentences: int, salt: str, **fields: Any) -> None:
        self.tokens: Tokens = []
        self.trace: dict[str, Any] = {}
        self.failure: str = ""
        self._body = {
            "model": NAME,
            "prompt": f"{number}. " + TEXT * sentences,
            "max_tokens": MAX_TOKENS,
            "temperature": 0.8 if number % 2 else 0,
            "seed": number,
            "logprobs": 0,
            "stream": True,
            "ignore_eos": True,
            "cache_salt": salt,
            **fields,
        }
        self._thread = threading.Thread(target=self._read, args=(f"{url}/v1/completions",))
        self._thread.start()

    def _read(self, url: str) -> None:
        headers = {contract.HEADER_TRACE: "1"}
        try:
            with httpx.stream("POST", url, json=self._body, headers=headers, timeout=240) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self._take(msgspec.json.decode(line[6:]))
        except Exception as error:
            self.failure = repr(error)

    def _take(self, chunk: dict[str, Any]) -> None:
        self.failure = self.failure or str(chunk.get("error", ""))
        self.trace = chunk.get("tandem", self.trace)
        for choice in chunk.get("choices", ()):
            told = choice.get("logprobs") or {"tokens": [], "token_logprobs": []}
            self.tokens += zip(told["tokens"], told["token_logprobs"], strict=True)

    def has(self, tokens: int) -> None:
        until(lambda: len(self.tokens) >= tokens or self.failure)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Tokens:
        self._thread.join(240)
        assert self.done
        assert not self.failure
        assert len(self.tokens) == self._body["max_tokens"]
        return self.tokens


def until(condition: Callable[[], object], within_s: float = 120) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.005)


def clients(url: str, sentences: int, salt: str, tokens: int) -> list[Client]:
    return [Client(url, number, sentences, salt, max_tokens=tokens) for number in range(4)]


def metric(url: str, pattern: str) -> float:
    text = httpx.get(url + contract.PATH_METRICS, timeout=20).text
    found = re.search(rf"^{pattern}\S* (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def moves(gateway: Any, outcome: str) -> float:
    return metric(gateway.url, f'tandem_gateway_migrations_total{{outcome="{outcome}"}}')


def failures(gateway: Any) -> float:
    text = httpx.get(gateway.url + contract.PATH_METRICS, timeout=20).text
    found = re.findall(r"^tandem_gateway_attempt_failures_total\S* (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def sent(pod: Any) -> float:
    return metric(pod.url, r'tandem_migration_bytes_total\{direction="out"')


@pytest.fixture(scope="module")
def undisturbed(gateway: Any, decode_pair: Any) -> Undisturbed:
    """The same requests with nobody draining; under a salt of their own, so nothing is cached."""

    @cache
    def ask(sentences: int, tokens: int = MAX_TOKENS) -> list[Tokens]:
        gateway.show(decode_pair[1].view())
        asking = clients(gateway.url, sentences, "undisturbed", tokens)
        return [client.wait() for client in asking]

    return ask


def begin(
    gateway: Any, a: Any, sentences: int, salt: str, tokens: int = MAX_TOKENS
) -> list[Client]:
    gateway.show(a.view())
    asking = clients(gateway.url, sentences, salt, tokens)
    for client in asking:
        client.has(3)
    return asking


def test_a_decode_pod_drains_under_four_clients(
    gateway: Any, decode_pair: Any, undisturbed: Undisturbed
) -> None:
    a, b = decode_pair
    whole = undisturbed(30, LONG_TOKENS)
    failed, moved = failures(gateway), moves(gateway, "moved")
    asking = begin(gateway, a, 30, "drains", LONG_TOKENS)
    gateway.show(a.view(leaving=True), b.view())
    a.wait_empty()
    assert not any(client.done for client in asking), "it is empty before they end"
    assert [client.wait() for client in asking] == whole, "tokens and their log probabilities"
    for client in asking:
        assert (client.trace["decode_pod"], client.trace["attempts"]) == ("decode-b", 1)
    assert failures(gateway) == failed
    assert moves(gateway, "moved") == moved + 4
    token_bytes = 30 * 2 * 3 * 64 * 4
    assert sent(a) > 4 * 30 * 15 * token_bytes, "nothing of it was computed again"
    b.wait_empty()


def test_the_drain_is_cancelled_in_mid_move(
    gateway: Any, decode_pair: Any, undisturbed: Undisturbed
) -> None:
    a, b = decode_pair
    whole = undisturbed(30)
    before, failed = sent(a), failures(gateway)
    asking = begin(gateway, a, 30, "cancelled")
    gateway.show(a.view(leaving=True), b.view())
    until(lambda: sent(a) > before)
    gateway.show(a.view(), b.view())
    assert [client.wait() for client in asking] == whole
    assert failures(gateway) == failed
    for pod in decode_pair:
        pod.wait_empty()


def test_the_other_pod_is_killed_in_mid_move(
    gateway: Any, decode_pair: Any, start_pod: Any, undisturbed: Undisturbed
) -> None:
    """Streams that had moved are computed again, the others have not been disturbed."""
    a, _ = decode_pair
    dies = start_pod("decode-c", Role.DECODE)
    whole = undisturbed(30)
    before = sent(a)
    asking = begin(gateway, a, 30, "receiver dies")
    gateway.show(a.view(leaving=True), dies.view())
    until(lambda: sent(a) > before)
    dies.kill()
    gateway.show(a.view())
    assert [client.wait() for client in asking] == whole
    a.wait_empty()


def test_the_draining_pod_is_killed_in_mid_move(
    gateway: Any, decode_pair: Any, start_pod: Any, undisturbed: Undisturbed
) -> None:
    _, b = decode_pair
    dies = start_pod("decode-c", Role.DECODE)
    whole = undisturbed(30)
    asking = begin(gateway, dies, 30, "sender dies")
    gateway.show(dies.view(leaving=True), b.view())
    until(lambda: sent(dies) > 0)
    dies.kill()
    assert [client.wait() for client in asking] == whole
    b.wait_empty()


@pytest.mark.parametrize("differs", ["secret", "dtype"])
def test_pods_that_do_not_belong_together(
    gateway: Any, decode_pair: Any, start_pod: Any, tmp_path: Path, differs: str
) -> None:
    """The streams end where they are."""
    a, _ = decode_pair
    (tmp_path / "other").write_bytes(b"another secret of thirty-two bytes")
    flags = {
        "secret": ("--handoff-secret-file", str(tmp_path / "other")),
        "dtype": ("--dtype", "bfloat16"),
    }
    stranger = start_pod("decode-c", Role.DECODE, *flags[differs])
    failed, tried = failures(gateway), moves(gateway, "failed")
    asking = begin(gateway, a, 5, f"stranger {differs}")
    gateway.show(a.view(leaving=True), stranger.view())
    for client in asking:
        client.wait()
        assert client.trace["decode_pod"] == "decode-a"
    assert failures(gateway) == failed
    assert moves(gateway, "failed") > tried
    a.wait_empty()


def test_sigterm_moves_the_streams_out(
    gateway: Any, decode_pair: Any, start_pod: Any, undisturbed: Undisturbed
) -> None:
    """`kubectl delete pod`: the process ends as soon as others have its streams."""
    _, b = decode_pair
    ends = start_pod("decode-c", Role.DECODE)
    whole = undisturbed(10, LONG_TOKENS)
    failed = failures(gateway)
    asking = begin(gateway, ends, 10, "sigterm", LONG_TOKENS)
    gateway.show(ends.view(), b.view())
    ends.process.terminate()
    ends.process.wait(60)
    assert not any(client.done for client in asking), "it ends before they do"
    assert [client.wait() for client in asking] == whole
    assert failures(gateway) == failed
