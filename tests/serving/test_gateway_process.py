"""The gateway as a process: finds pods through an API server, outlives it, ends gracefully."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
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
POD_IP = f"127.77.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 2}"
"""A pod listens on an address of its own and the usual ports, as in a cluster."""


@pytest.fixture
def api() -> Iterator[ApiThread]:
    api = ApiThread()
    yield api
    api.close()


def test_a_gateways_life(api: ApiThread, start_pod: Any, tmp_path: Path) -> None:
    ports = ["--port", str(contract.HTTP_PORT), "--grpc-port", str(contract.GRPC_PORT)]
    runtime = start_pod("both-0", Role.BOTH, *ports, wait=False, **{contract.ENV_POD_IP: POD_IP})
    shown = pod("both-0", ip=POD_IP, role="both", served=NAME)
    api.api.pods = [pod("both-0", ip=POD_IP, role="both", served=NAME, ready=False)]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    gateway = start_gateway(tmp_path, api, port)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: ready(url) == 200)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="0 are ready"):
                client.completions.create(model=NAME, prompt="x")
            pod_url = f"http://{POD_IP}:{contract.HTTP_PORT}"
            until(lambda: ready(pod_url) == 200, 240)
            api.call(api.send("MODIFIED", {**shown, "metadata": {**shown["metadata"]}}))

            def serves() -> bool:
                with contextlib.suppress(openai.InternalServerError):
                    client.completions.create(model=NAME, prompt="x", max_tokens=1)
                    return True
                return False

            until(serves)
            api.api.events.put_nowait(None)
            api.call(api.api.stop())
            time.sleep(1)
            stream = client.completions.create(
                model=NAME,
                prompt="Once upon a time",
                max_tokens=60,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            text = next(stream).choices[0].text
            state = httpx.get(url + contract.PATH_STATE, timeout=5).json()
            assert state["streams"] == 1
            assert state["api_view_age_s"] > 0.5, "the API is away, its last view serves"
            gateway.send_signal(signal.SIGTERM)
            until(lambda: ready(url) == 503, 5)
            text += "".join(chunk.choices[0].text for chunk in stream)
        assert text.startswith(", the city of Nova Haven")
        assert gateway.wait(timeout=20) == 0
    finally:
        gateway.kill()
        gateway.wait()
    assert runtime.process.poll() is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--handoff-secret-file", "/nowhere/key"], "the handoff secret /nowhere/key is missing"),
        (["--kubeconfig", "/nowhere/config"], "no way to the Kubernetes API"),
        ([], "no way to the Kubernetes API"),
    ],
)
def test_bad_configuration(flags: list[str], sentence: str, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_bytes(b"0123456789abcdef0123456789abcdef")
    environment = {n: v for n, v in os.environ.items() if not n.startswith("KUBERNETES_")}
    arguments = ["--namespace", "ns", "--port", "0", "--handoff-secret-file", str(secret), *flags]
    result = subprocess.run(
        [sys.executable, "-m", "tandem_runtime.gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert result.returncode == contract.EXIT_BAD_CONFIG, result.stderr
    assert sentence in result.stderr.strip().splitlines()[-1]
