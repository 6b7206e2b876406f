"""Fleets of the real runtime on the real control plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fleets import Fleets, model
from served import START_S, Served, real_fleet
from tandem.cluster.running import Running


@pytest.fixture
def serve(cluster: Running, operator: None, namespace: str) -> Callable[..., Served]:
    """`serve(name, prefill=1, decode=2, dtype="bfloat16")`: a Model and a fleet, once Ready."""

    def apply(
        name: str = "chat",
        *,
        prefill: int | None = 1,
        decode: int | None = 2,
        dtype: str = "bfloat16",
        **spec: Any,
    ) -> Served:
        fleets = Fleets(cluster, namespace)
        served_model = f"{name}-smollm2"
        fleets.apply(
            model(served_model, servedNames=[served_model], dtype=dtype),
            real_fleet(name, served_model, prefill, decode, **spec),
        )
        fleets.wait_ready(name, START_S)
        url = fleets.get(f"inferencefleet/{name}")["status"]["url"]
        return Served(fleets, name, served_model, url)

    return apply
