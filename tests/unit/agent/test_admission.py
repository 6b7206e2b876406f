from __future__ import annotations

from typing import Any

import pytest
from tandem.agent.admission import refuse, requests

CAPACITY = {"cpu": "2", "memory": "4Gi", "pods": "3", "nvidia.com/gpu": "8"}
LABELS = {"zone": "a", "size": "4", "metadata.name": "node-1"}


def container(**resources: Any) -> dict[str, Any]:
    return {"name": "c", "resources": resources}


def pod(*containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"spec": {"containers": list(containers), **spec}}


def gpus(count: int) -> dict[str, Any]:
    return pod(container(limits={"nvidia.com/gpu": str(count)}))


def test_requests_add_up_and_default_to_limits() -> None:
    asked = requests(
        pod(
            container(requests={"cpu": "500m"}, limits={"cpu": "1", "memory": "1Gi"}),
            container(limits={"nvidia.com/gpu": "2"}),
        )
    )
    assert asked == {"cpu": 500, "memory": 2**30, "nvidia.com/gpu": 2, "pods": 1}


def test_init_containers_count_by_the_largest_and_sidecars_always() -> None:
    sidecar = {**container(requests={"cpu": "100m"}), "restartPolicy": "Always"}
    asked = requests(
        pod(
            container(requests={"cpu": "1"}),
            initContainers=[
                container(requests={"cpu": "1500m"}),
                sidecar,
                container(requests={"cpu": "1200m"}),
            ],
        )
    )
    assert asked["cpu"] == 1500
    assert requests(pod(container(requests={"cpu": "2"}), initContainers=[sidecar]))["cpu"] == 2100


def test_what_fits_is_admitted() -> None:
    assert refuse(gpus(4), [gpus(4)], CAPACITY, LABELS) is None


def test_what_does_not_fit_is_refused_in_a_kubelets_words() -> None:
    refusal = refuse(gpus(4), [gpus(6)], CAPACITY, LABELS)
    assert refusal is not None
    assert refusal.reason == "OutOfnvidia.com/gpu"
    assert refusal.message == (
        "Node didn't have enough resource: nvidia.com/gpu, requested: 4, used: 6, capacity: 8"
    )


def test_a_resource_that_the_node_lacks() -> None:
    refusal = refuse(pod(container(limits={"amd.com/gpu": "1"})), [], CAPACITY, LABELS)
    assert refusal is not None
    assert refusal.reason == "OutOfamd.com/gpu"


def test_pods_count() -> None:
    refusal = refuse(pod(), [pod(), pod(), pod()], CAPACITY, LABELS)
    assert refusal is not None
    assert refusal.reason == "OutOfpods"


def affinity(*rules: dict[str, Any]) -> dict[str, Any]:
    term = {"matchExpressions": list(rules)}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return pod(affinity={"nodeAffinity": required})


@pytest.mark.parametrize(
    ("candidate", "fits"),
    [
        (pod(nodeSelector={"zone": "a"}), True),
        (pod(nodeSelector={"zone": "b"}), False),
        (affinity({"key": "zone", "operator": "In", "values": ["a", "b"]}), True),
        (affinity({"key": "zone", "operator": "NotIn", "values": ["a"]}), False),
        (affinity({"key": "none", "operator": "Exists"}), False),
        (affinity({"key": "none", "operator": "DoesNotExist"}), True),
        (affinity({"key": "size", "operator": "Gt", "values": ["3"]}), True),
        (affinity({"key": "size", "operator": "Lt", "values": ["3"]}), False),
    ],
)
def test_node_selection(candidate: dict[str, Any], fits: bool) -> None:
    refusal = refuse(candidate, [], CAPACITY, LABELS)
    assert (refusal is None) is fits
    if refusal is not None:
        assert refusal.reason == "NodeAffinity"
