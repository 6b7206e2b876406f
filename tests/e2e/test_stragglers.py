"""Paced pods of the real runtime, some slowed outside their engines: one is found, all are not."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleets import GPU, Fleets, eventually, model
from load import Load
from served import START_S
from tandem.agent.slowing import ANNOTATION_SLOW_PERCENT
from tandem.cluster.paths import cache_home
from tandem.cluster.running import Running
from tandem_runtime.checkpoint.tiny import write_tiny

pytestmark = pytest.mark.timeout(900)

WINDOW_S, WINDOWS = 5, 3
"""The shortest that a policy may ask for."""
REQUESTS_PER_S = 6.0
POLICY = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "NodeHealthPolicy",
    "metadata": {"name": "default"},
    "spec": {
        "mode": "Active",
        "signals": {
            "stragglers": {"percent": 60, "windows": WINDOWS, "windowSeconds": WINDOW_S},
            "clearSeconds": 3,
        },
    },
}
PACE = ["--pace", "mi300x:llama-3.1-70b"]
"""Steps of 34 ms: three pods leave a small machine time for everything else."""


@pytest.fixture
def tiny() -> Iterator[Path]:
    """The tiny model, where containers see it: neither /tmp nor the cluster's folder is theirs."""
    with tempfile.TemporaryDirectory(dir=cache_home().parent) as folder:
        write_tiny(Path(folder))
        yield Path(folder)


@pytest.fixture
def paced(cluster: Running, operator: None, namespace: str, tiny: Path) -> Iterator[Fleets]:
    """A fleet of three paced pods on the tiny model."""
    fleets = Fleets(cluster, namespace)
    container = {"name": "runtime", "args": PACE}
    pool = {
        "replicas": 3,
        "accelerator": GPU,
        "template": {"spec": {"containers": [container]}},
    }
    fleets.apply(
        model("tiny", uri=f"file://{tiny}"),
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "InferenceFleet",
            "metadata": {"name": "chat"},
            "spec": {"modelRef": {"name": "tiny"}, "decode": pool},
        },
    )
    fleets.wait_ready(timeout_s=START_S)
    yield fleets
    cluster.kubectl("delete", "nodehealthpolicies", "--all")


def slow(fleets: Fleets, pods: list[str], percent: int) -> None:
    fleets.kubectl("annotate", "--overwrite", "pod", *pods, f"{ANNOTATION_SLOW_PERCENT}={percent}")


def entries(fleets: Fleets) -> list[dict[str, Any]]:
    body = json.loads(fleets.kubectl("get", "nodehealthpolicy", "default", "-o", "json"))
    found: list[dict[str, Any]] = body.get("status", {}).get("nodes", [])
    return found


def steps(fleets: Fleets, pod: str) -> tuple[float, float]:
    """How many its engine took, and the seconds of all."""
    sums = fleets.state(pod)["work"]["steps"]
    return sums["steps"], sums["seconds"]


def step_s(fleets: Fleets, pod: str, least: int = 60) -> float:
    """Of the next steps, on average."""
    steps_before, seconds_before = steps(fleets, pod)
    eventually(lambda: steps(fleets, pod)[0] >= steps_before + least, timeout_s=120)
    steps_now, seconds_now = steps(fleets, pod)
    return (seconds_now - seconds_before) / (steps_now - steps_before)


def test_one_slow_pod_is_replaced_and_equally_slow_ones_are_left_alone(paced: Fleets) -> None:
    url = paced.get("inferencefleet/chat")["status"]["url"]
    pods = sorted(paced.ready("chat-decode"))
    assert paced.state(pods[0])["pace"] == "MI300X:llama-3.1-70b"
    with Load(url, "tiny", REQUESTS_PER_S) as load:
        well_s = step_s(paced, pods[0])
        assert well_s >= 0.033  # the weights of 70B parameters in bf16 at 4.24 TB/s
        slow(paced, pods, 150)
        eventually(lambda: step_s(paced, pods[0]) > 1.8 * well_s, timeout_s=120)
        paced.apply(POLICY)
        # Long enough that one of them would have been found; what is slow is all of them.
        until_s = time.monotonic() + (WINDOWS + 3) * WINDOW_S
        eventually(lambda: entries(paced) or time.monotonic() > until_s, every_s=1.0)
        assert not entries(paced)
        slow(paced, pods[1:], 0)
        pulled = eventually(lambda: [e for e in entries(paced) if e.get("pods")], timeout_s=240)
        assert pulled[0]["message"].startswith(f"{pods[0]} on "), pulled
        assert "its peers for 3 windows" in pulled[0]["message"]
        eventually(lambda: pods[0] not in paced.names("chat-decode"), timeout_s=240)
        eventually(lambda: len(paced.ready("chat-decode")) == 3, timeout_s=240)
    assert set(pods[1:]) < paced.names("chat-decode")
    assert load.failures == []
    assert len(load.outcomes) > 20
