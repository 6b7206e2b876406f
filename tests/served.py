"""Fleets of the real runtime, serving SmolLM2-135M: what tests/e2e applies and waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fleets import GPU, Fleets

START_S = 240.0
"""Several pods that import torch and read weights on a shared machine of two cores."""


@dataclass(frozen=True)
class Served:
    """A fleet that serves."""

    fleets: Fleets
    name: str
    model: str
    url: str
    """Of the gateway."""

    def wait_ready(self) -> None:
        self.fleets.wait_ready(self.name, START_S)


def real_pool(replicas: int | None, **environment: str) -> dict[str, Any]:
    """A pool of the real runtime; another environment is another revision."""
    container = {
        "name": "runtime",
        "env": [{"name": name, "value": value} for name, value in environment.items()],
    }
    size = {} if replicas is None else {"replicas": replicas}
    return {"accelerator": GPU, "template": {"spec": {"containers": [container]}}, **size}


def real_fleet(
    name: str, model_name: str, prefill: int | None, decode: int | None, **spec: Any
) -> dict[str, Any]:
    """An InferenceFleet; `prefill` None leaves that pool out."""
    pools = {"decode": real_pool(decode)}
    if prefill is not None:
        pools["prefill"] = real_pool(prefill)
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "InferenceFleet",
        "metadata": {"name": name},
        "spec": {"modelRef": {"name": model_name}, **pools, **spec},
    }
