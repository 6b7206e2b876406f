"""The fleet that faults happen to: its parts by name, and whether all of them are there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from tandem.cluster.process import ProcessId, send_signal
from tandem.cluster.running import KubectlError, NotRunningError, Running
from tandem_runtime import contract

from benchmarks.fleet import NAMESPACE, BenchFleet, free_port

SYSTEM: Final = "tandem-system"
STEADY_S: Final = 4.0
"""So long everything must have been there to count as recovered."""
RECOVERY_S: Final = 420.0
READY_S: Final = 60.0


@dataclass(frozen=True)
class Scene:
    """One fleet on a cluster of its own."""

    fleet: BenchFleet
    prefill: int
    decode: int

    @property
    def running(self) -> Running:
        return self.fleet.running

    def kubectl(self, *arguments: str, timeout_s: float = 60.0) -> str:
        return self.running.kubectl(f"--namespace={NAMESPACE}", *arguments, timeout_s=timeout_s)

    def patch(self, change: dict[str, Any]) -> None:
        """`kubectl edit inferencefleet`."""
        name = f"inferencefleet/{self.fleet.name}"
        self.kubectl("patch", name, "--type=merge", "--patch", json.dumps(change))

    def pod(self, role: contract.Role) -> ProcessId:
        """The runtime's process of the first pod of a role."""
        name, _ = self.fleet.pods(role)[0]
        return self.running.container(NAMESPACE, name, "runtime")

    def first(self, component: str, namespace: str) -> str:
        """The name of the first running pod of the operator or of the gateway."""
        selector = f"app.kubernetes.io/component={component}"
        for pod in self._items("pods", f"--namespace={namespace}", f"--selector={selector}"):
            if _ready(pod) and "deletionTimestamp" not in pod["metadata"]:
                return str(pod["metadata"]["name"])
        raise NotRunningError(f"no {component} pod of namespace {namespace} is Ready")

    def quiet_node(self) -> str:
        """The node with a decode pod that carries as little else as possible.

        Gateways have clients' connections: losing one is a fault of its own.
        """
        weights: dict[str, int] = {}
        decodes: set[str] = set()
        for pod in self._items("pods", "--all-namespaces"):
            node = pod["spec"].get("nodeName", "")
            labels = pod["metadata"].get("labels", {})
            if labels.get(contract.LABEL_ROLE) == contract.Role.DECODE:
                decodes.add(node)
            component = labels.get("app.kubernetes.io/component")
            weights[node] = weights.get(node, 0) + (100 if component == "gateway" else 1)
        return min(decodes, key=lambda node: weights[node])

    def full(self) -> bool:
        """Whether every pod that was asked for is Ready, none is leaving, and all nodes are."""
        try:
            pods = self._items("pods", "--all-namespaces")
            nodes = self._items("nodes")
        except (KubectlError, subprocess.TimeoutExpired):
            return False
        if not all(map(_ready, nodes)) or not all(map(_ready, _lasting(pods))):
            return False
        if any("deletionTimestamp" in pod["metadata"] for pod in pods):
            return False
        roles = [pod["metadata"].get("labels", {}).get(contract.LABEL_ROLE) for pod in pods]
        wanted = (self.prefill, self.decode)
        return (roles.count(contract.Role.PREFILL), roles.count(contract.Role.DECODE)) == wanted

    def recovered_after_s(self, since_s: float) -> float:
        """Waits until everything has been there for a while; seconds from `since_s` until it was.

        Raises:
            TimeoutError: it never was.
        """
        lacking_s, full_since_s = since_s, None
        while full_since_s is None or time.monotonic() - full_since_s < STEADY_S:
            now_s = time.monotonic()
            if self.full():
                full_since_s = now_s if full_since_s is None else full_since_s
            else:
                lacking_s, full_since_s = now_s, None
            if now_s - since_s > RECOVERY_S:
                raise TimeoutError(self.kubectl("get", "pods,nodes", "--output=wide"))
            time.sleep(1.0)
        return lacking_s - since_s

    def _items(self, *what: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            self.running.kubectl("get", *what, "--output=json", "--request-timeout=5s")
        )["items"]
        return found


def _lasting(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the resolvers, which end."""
    return [pod for pod in pods if pod["status"].get("phase") not in ("Succeeded", "Failed")]


def _ready(body: dict[str, Any]) -> bool:
    conditions = body.get("status", {}).get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def kill(process: ProcessId, signum: signal.Signals = signal.SIGKILL) -> None:
    """Raises NotRunningError."""
    if not send_signal(process, signum):
        raise NotRunningError(f"process {process.pid} has ended by itself")


@contextmanager
def plain_gateway(fleet: BenchFleet) -> Iterator[str]:
    """The URL of a gateway that neither resumes streams nor moves them: what peers do."""
    with tempfile.TemporaryDirectory() as folder:
        secret, log = Path(folder) / "secret", Path(folder) / "log"
        secret.write_bytes(fleet.handoff_secret())
        port = free_port()
        arguments = [
            sys.executable, "-m", "tandem_runtime.gateway", "--no-resume", "--no-migrate",
            f"--namespace={NAMESPACE}", f"--kubeconfig={fleet.running.kubeconfig}",
            "--host=127.0.0.1", f"--port={port}", f"--grpc-port={free_port()}",
            f"--handoff-secret-file={secret}",
        ]  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments, stdout=output, stderr=subprocess.STDOUT, env=os.environ.copy()
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_serves(url, fleet.model, process, log)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait_serves(url: str, model: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/v1/models", timeout=5)
            if answer.status_code == 200 and model in answer.text:
                return
        time.sleep(0.3)
    raise RuntimeError(f"the plain gateway does not serve:\n{log.read_text()}")
