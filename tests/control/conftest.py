"""Pods for tests of the control plane and its nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

IMAGE = "tandem.dev/runtime:0.1.0"


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
