"""The local cluster is a real control plane, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable

from tandem.cluster.pins import Pins
from tandem.cluster.running import Running

Kubectl = Callable[..., str]


def test_the_api_server_has_the_pinned_version(kubectl: Kubectl) -> None:
    version = json.loads(kubectl("get", "--raw", "/version"))
    assert version["gitVersion"] == f"v{Pins.read().kubernetes}"


def test_a_pod_runs_and_goes(kubectl: Kubectl, namespace: str, cluster: Running) -> None:
    image = "tandem.dev/runtime:0.1.0"
    kubectl(
        "run", "p", f"--image={image}", "-n", namespace, "--restart=Never", "--command", "--",
        "sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done",
    )  # fmt: skip
    kubectl("wait", "pod/p", "--for=condition=Ready", "-n", namespace, "--timeout=30s")
    assert cluster.container(namespace, "p", "p").pid > 0
    kubectl("delete", "pod", "p", "-n", namespace, "--timeout=20s")
