"""Autoscaled Pools on a real API server, with pods that pretend their load."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fleets import Fleets, eventually, fleet, model, pool
from tandem.cluster.running import Running

pytestmark = pytest.mark.usefixtures("operator")
OBJECTIVES = {"timePerOutputToken": {"targetMilliseconds": 25}}
POLICY = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "ScalingPolicy",
    "metadata": {"name": "quick"},
    "spec": {
        "windows": {"holdSeconds": 10},
        "steps": {"scaleIn": {"percent": 100, "intervalSeconds": 0}},
        "forecast": {"percent": 0},
    },
}


HPA_S = 90
"""It looks every 15 s, and learns of new kinds every 30."""


def hpa(least: int, most: int) -> dict[str, Any]:
    """A HorizontalPodAutoscaler of the decode pool. Without a metrics server its bounds alone
    count: a size outside of them it brings back."""
    target = {"apiVersion": "tandem.dev/v1alpha1", "kind": "Pool", "name": "chat-decode"}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "chat-decode"},
        "spec": {"scaleTargetRef": target, "minReplicas": least, "maxReplicas": most},
    }


@pytest.fixture
def fleets(cluster: Running, namespace: str) -> Iterator[Fleets]:
    """A fleet whose decode pool is autoscaled from one replica; its streams end with the test."""
    fleets = Fleets(cluster, namespace)
    scaling = {"minReplicas": 1, "maxReplicas": 4, "policyRef": {"name": "quick"}}
    decode = pool(None, STANDIN_WORK="1") | {"scaling": scaling}
    fleets.apply(POLICY, model(), fleet(decode=decode, objectives=OBJECTIVES))
    fleets.wait_ready()
    fleets.wait_condition("ScalingActive", "True", "Scaling", timeout_s=30)
    yield fleets
    fleets.end_streams()


def size(fleets: Fleets) -> int:
    return int(fleets.get("pool/chat-decode")["spec"]["replicas"])


def scaled(fleets: Fleets) -> list[dict[str, Any]]:
    status = fleets.get("pool/chat-decode")["status"].get("scaling") or {}
    found: list[dict[str, Any]] = status.get("decisions", [])
    return found


def test_a_pool_follows_its_load_there_and_back(fleets: Fleets) -> None:
    (busy,) = fleets.names("chat-decode")
    # 68 streams keep 25 ms, of which a few less may have been learned: 120, and the root of that
    # for chance, take three replicas at 85 %. What runs is averaged over 15 s: there may be a step
    # between.
    fleets.pretend_running(busy, 120)
    assert eventually(lambda: size(fleets) == 3, timeout_s=60)
    assert eventually(lambda: len(fleets.pods("chat-decode")) == 3, timeout_s=30)
    grown = [d for d in scaled(fleets) if d["replicas"] > d["replicasBefore"]]
    assert (grown[0]["replicasBefore"], grown[-1]["replicas"]) == (1, 3)
    assert {decision["reason"] for decision in grown} == {"LoadOverBand"}
    assert 2 * 0.85 * 57 < grown[-1]["demand"] <= 120 * 1.2
    first = f"Pool chat-decode: 1 -> {grown[0]['replicas']} replicas, LoadOverBand"
    assert any(first in event["note"] for event in fleets.events("Scaled"))
    assert size(fleets) == 3
    assert fleets.get("pool/chat-prefill")["spec"]["replicas"] == 1
    # Who leaves has the least to lose: the pod with streams stays.
    fleets.pretend_running(busy, 20)
    assert eventually(lambda: size(fleets) == 1, timeout_s=60)
    assert eventually(lambda: list(fleets.names("chat-decode")) == [busy], timeout_s=30)
    eventually(lambda: scaled(fleets)[-1]["reason"] == "LoadUnderBand")


def test_another_writer_is_told(fleets: Fleets) -> None:
    fleets.kubectl("scale", "pool/chat-decode", "--replicas=2")
    said = fleets.wait_condition("ScalingActive", "False", "ReplicasContended", timeout_s=30)
    assert "somebody else wrote the size of Pool chat-decode" in said.sentence
    assert size(fleets) == 2


def test_an_hpa_sizes_a_pool_until_a_policy_does_and_they_do_not_fight(
    cluster: Running, namespace: str
) -> None:
    fleets = Fleets(cluster, namespace)
    fleets.apply(POLICY, model(), fleet(decode=pool(None), objectives=OBJECTIVES), hpa(2, 3))
    fleets.wait_ready()
    assert eventually(lambda: size(fleets) == 2, timeout_s=HPA_S)
    fleets.kubectl("scale", "pool/chat-decode", "--replicas=5")
    assert eventually(lambda: size(fleets) == 3, timeout_s=HPA_S)
    assert eventually(lambda: len(fleets.ready("chat-decode")) == 3, timeout_s=30)
    assert not fleets.events("ReplicasOverwritten")
    # A policy that wants one replica, and an HPA that wants two.
    scaling = {"minReplicas": 1, "maxReplicas": 1, "policyRef": {"name": "quick"}}
    fleets.edit("inferencefleet/chat", {"spec": {"decode": {"scaling": scaling}}})
    said = fleets.wait_condition("ScalingActive", "False", "ReplicasContended", timeout_s=HPA_S)
    assert "Remove the other writer (an HPA or a ScaledObject on the Pool)" in said.sentence
    assert size(fleets) == 2
    # The policy wrote once.
    (event,) = fleets.events("Scaled")
    assert "Pool chat-decode: 3 -> 1 replicas, OutOfBounds" in event["note"]


def test_a_policy_that_goes_holds_the_size(fleets: Fleets) -> None:
    fleets.kubectl("delete", "scalingpolicy", "quick")
    said = fleets.wait_condition("ScalingActive", "False", "PolicyNotFound", timeout_s=30)
    assert "ScalingPolicy quick does not exist in namespace" in said.sentence
    assert size(fleets) == 1
    table = fleets.kubectl("get", "tandem")
    assert "pool.tandem.dev/chat-decode" in table


def test_to_zero_and_woken_by_a_request_at_the_gateway(fleets: Fleets) -> None:
    idle = {"windows": {"holdSeconds": 0, "idleSeconds": 30}}
    fleets.edit("scalingpolicy/quick", {"spec": idle})
    zero = {"scaling": {"minReplicas": 0, "maxReplicas": 4}}
    fleets.edit("inferencefleet/chat", {"spec": {"decode": zero}})
    assert eventually(lambda: size(fleets) == 0, timeout_s=60)
    assert eventually(lambda: not fleets.pods("chat-decode", terminating=True), timeout_s=30)
    fleets.wait_condition("Ready", "True", "ScaledToZero")
    eventually(lambda: scaled(fleets)[-1]["reason"] == "Idle")
    url = fleets.get("inferencefleet/chat")["status"]["url"]
    body = json.dumps({"model": "smollm2", "prompt": "x", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", data=body, headers={"content-type": "application/json"}
    )
    with ThreadPoolExecutor() as pool:
        # Stand-ins have no tokenizer: the request wakes a pod, and waits on.
        asking = pool.submit(urllib.request.urlopen, request, timeout=30)
        assert eventually(lambda: size(fleets) == 1, timeout_s=30)
        assert eventually(lambda: len(fleets.pods("chat-decode")) == 1, timeout_s=30)
        eventually(lambda: scaled(fleets)[-1]["reason"] == "Wake")
        with pytest.raises(TimeoutError):
            asking.result()
