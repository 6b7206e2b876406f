"""Pods for tests of the control plane and its nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Kubectl = Callable[..., str]
Objects = Callable[..., Any]
Pod = dict[str, Any]
IMAGE = "tandem.dev/runtime:0.1.0"
READY = "--for=condition=Ready"


@pytest.fixture(scope="session")
def make_pod() -> Callable[..., dict[str, Any]]:
    """`make_pod(name, script, container={...}, **spec)`: a pod whose container `c` runs a shell
    script; `container` and `spec` are merged over it."""

    def make(
        name: str, script: str = "exec sleep 600", container: Any = None, **spec: Any
    ) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "terminationGracePeriodSeconds": 2,
                "containers": [
                    {
                        "name": "c",
                        "image": IMAGE,
                        "command": ["sh", "-c", script],
                        **(container or {}),
                    }
                ],
                **spec,
            },
        }

    return make


@pytest.fixture
def run(
    apply: Objects, kubectl: Kubectl, namespace: str, make_pod: Objects, get: Objects
) -> Callable[..., Pod]:
    """`run(name, script, ...)` applies `make_pod(...)`, waits until it is Ready, returns it."""

    def run_pod(name: str, *arguments: Any, **changes: Any) -> Pod:
        apply(make_pod(name, *arguments, **changes))
        kubectl("wait", f"pod/{name}", READY, "-n", namespace, "--timeout=30s")
        pod: Pod = get("pod", name)
        return pod

    return run_pod


@pytest.fixture
def phase(get: Objects) -> Callable[[str], str]:
    """The phase of a pod."""
    return lambda name: str(get("pod", name)["status"]["phase"])


@pytest.fixture
def container(get: Objects) -> Callable[..., Pod]:
    """The status of a pod's container."""

    def status(name: str, container: str = "c") -> Pod:
        pod = get("pod", name)["status"]
        entries = [
            *(pod.get("initContainerStatuses") or []),
            *(pod.get("containerStatuses") or []),
        ]
        found: Pod = next((entry for entry in entries if entry["name"] == container), {})
        return found

    return status


@pytest.fixture
def reasons(kubectl: Kubectl, namespace: str) -> Callable[[str], dict[str, str]]:
    """The Events about a pod: reason to its latest message."""

    def read(name: str) -> dict[str, str]:
        selector = f"--field-selector=involvedObject.name={name}"
        events = json.loads(kubectl("get", "events", "-n", namespace, selector, "-o", "json"))
        return {event["reason"]: event["message"] for event in events["items"]}

    return read


@pytest.fixture
def logs(kubectl: Kubectl, namespace: str) -> Callable[..., str]:
    """`kubectl logs` of a pod."""
    return lambda *arguments: kubectl("logs", "-n", namespace, *arguments)
