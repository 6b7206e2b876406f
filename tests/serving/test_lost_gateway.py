"""Gateway processes that are killed or stopped while a client streams, and another one beside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_processes import ApiThread, ready, start_gateway, until
from played_api import pod
from tandem_runtime import contract
from tandem_runtime.contract import Role

NAME = "smollm2-135m"
POD_IP = f"127.78.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 2}"
TOKENS = 256
BODY = {
    "model": NAME,
    "prompt": "It was a bright cold day in April, and",
    "max_tokens": TOKENS,
    "temperature": 0.8,
    "seed": 7,
    "logprobs": 0,
    "stream": True,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture
def api() -> Iterator[ApiThread]:
    api = ApiThread()
    yield api
    api.close()


def start(folder: Path, api: ApiThread) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    return start_gateway(folder, api, port), f"http://127.0.0.1:{port}"


class Client:
    """Reads in a thread, so that its gateway can be taken away meanwhile."""

    def __init__(self) -> None:
        self.stream = self.last_event_id = ""
        self.tokens: list[tuple[str, float]] = []
        self.usage: dict[str, int] | None = None
        self.done = False
        self.progress: list[tuple[str, int]] = []
        """After each event: its id, and the tokens that had come."""
        self._thread = threading.Thread()

    def begin(self, url: str) -> None:
        self._thread = threading.Thread(target=self._read, args=("POST", url + "/v1/completions"))
        self._thread.start()

    def go_on(self, url: str) -> None:
        path = f"{url}/v1/streams/{self.stream}"
        self._thread = threading.Thread(target=self._read, args=("GET", path))
        self._thread.start()

    def wait(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive()

    def _read(self, method: str, url: str) -> None:
        body = BODY if method == "POST" else None
        headers = {"last-event-id": self.last_event_id} if self.last_event_id else {}
        event_id = ""
        try:
            with httpx.stream(method, url, json=body, headers=headers, timeout=60) as reply:
                self.stream = reply.headers[contract.HEADER_STREAM]
                for line in reply.iter_lines():
                    if line.startswith("id: "):
                        event_id = line[4:]
                    elif line == "data: [DONE]":
                        self.done = True
                    elif line.startswith("data: {") and "error" not in line:
                        self._take(json.loads(line[6:]))
                        self.last_event_id = event_id
                        self.progress.append((event_id, len(self.tokens)))
        except httpx.TransportError:
            return

    def _take(self, chunk: dict[str, Any]) -> None:
        self.usage = chunk["usage"]
        for choice in chunk["choices"]:
            told = choice["logprobs"]
            self.tokens += zip(told["tokens"], told["token_logprobs"], strict=True)


def test_streams_outlive_their_gateway(api: ApiThread, start_pod: Any, tmp_path: Path) -> None:
    ports = ["--port", str(contract.HTTP_PORT), "--grpc-port", str(contract.GRPC_PORT)]
    start_pod("both-0", Role.BOTH, *ports, wait=False, **{contract.ENV_POD_IP: POD_IP})
    pod_url = f"http://{POD_IP}:{contract.HTTP_PORT}"
    until(lambda: ready(pod_url) == 200, 240)
    api.api.pods = [pod("both-0", ip=POD_IP, role="both", served=NAME)]
    (killed, first), (_, second) = gateways = [start(tmp_path, api) for _ in range(2)]
    try:
        until(lambda: ready(first) == 200 and ready(second) == 200)
        undisturbed = Client()
        undisturbed.begin(second)
        undisturbed.wait()
        assert undisturbed.done
        assert len(undisturbed.tokens) == TOKENS

        stopped = Client()
        stopped.begin(first)
        until(lambda: len(stopped.progress) > 5)
        killed.send_signal(signal.SIGSTOP)
        elsewhere = Client()
        elsewhere.stream = stopped.stream
        elsewhere.last_event_id, tokens = stopped.progress[-1]
        elsewhere.tokens = stopped.tokens[:tokens]
        elsewhere.go_on(second)
        elsewhere.wait()
        assert_same(elsewhere, undisturbed)
        killed.send_signal(signal.SIGCONT)
        stopped.wait()
        assert stopped.tokens == undisturbed.tokens[: len(stopped.tokens)]

        lost = Client()
        lost.begin(first)
        until(lambda: len(lost.progress) > 5)
        killed.kill()
        lost.wait()
        assert not lost.done
        lost.go_on(second)
        lost.wait()
        assert_same(lost, undisturbed)

        with openai.OpenAI(base_url=f"{second}/v1", api_key="none") as client:
            answer = client.completions.create(model=NAME, prompt="x", max_tokens=1)
            assert answer.usage is not None
        state = httpx.get(pod_url + contract.PATH_STATE, timeout=10).json()
        assert state["running"] + state["waiting"] == 0
    finally:
        for process, _ in gateways:
            process.kill()
            process.wait()


def assert_same(one: Client, undisturbed: Client) -> None:
    assert one.done
    assert one.tokens == undisturbed.tokens
    assert one.usage is not None
    assert undisturbed.usage is not None
    assert one.usage["total_tokens"] == undisturbed.usage["total_tokens"]
