"""Everything that is made for one fleet, against the committed manifests in ../golden.

`UPDATE_GOLDEN=1 pytest tests/unit/plan/test_golden.py` writes them anew; review the difference.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.resources import FLEETS, MODELS, PODS, SECRETS

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATE = {
    "spec": {
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "containers": [
            {"name": "runtime", "resources": {"limits": {"cpu": "4", "memory": "16Gi"}}},
            {"name": "sidecar", "image": "registry.example/sidecar:1"},
        ],
    }
}
GPU = {"resource": "nvidia.com/gpu", "count": 1}
CASES = {
    "split": fleet_body(
        prefill={"replicas": 1, "accelerator": GPU},
        decode={"replicas": 2, "accelerator": GPU, "template": TEMPLATE},
    ),
    "aggregated": fleet_body(prefill=None, decode={"replicas": 1}),
    "tiers": fleet_body(
        prefill=None,
        decode={"replicas": 1, "accelerator": GPU},
        cacheTiers=[
            {"name": "gpu", "medium": "Accelerator", "percent": 80},
            {
                "name": "host",
                "medium": "Memory",
                "size": "64Gi",
                "tenants": [
                    {"name": "search", "floorPercent": 25, "quotaPercent": 50},
                    {"name": "a $(TANDEM_FLEET)", "quotaPercent": 10},
                ],
                "defaultQuotaPercent": 5,
            },
            {
                "name": "nvme",
                "medium": "Disk",
                "size": "500Gi",
                "volume": {"persistentVolumeClaim": {"claimName": "kv"}},
                "tenants": [{"name": "default", "floorPercent": 20}],
            },
            {
                "name": "shared",
                "medium": "Remote",
                "uri": "rediss://valkey.cache:6379",
                "secretRef": {"name": "valkey"},
                "ttlSeconds": 3600,
            },
            {"name": "peers", "medium": "Peer"},
        ],
    ),
}


def normalised(body: dict[str, Any]) -> dict[str, Any]:
    """Without what a cluster adds."""
    metadata = copy.deepcopy(body["metadata"])
    for owner in metadata.get("ownerReferences", ()):
        owner["uid"] = f"uid of {owner['kind']} {owner['name']}"
    if "tandem.dev/applied" in metadata.get("annotations", {}):
        metadata["annotations"]["tandem.dev/applied"] = "hash of what was applied, uids included"
    for field in ("uid", "resourceVersion", "creationTimestamp", "generation"):
        metadata.pop(field, None)
    return {k: v for k, v in body.items() if k != "status"} | {"metadata": metadata}


def check(text: str, path: Path) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "run with UPDATE_GOLDEN=1 and review the difference"


@pytest.mark.parametrize("case", CASES)
async def test_golden(case: str) -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(CASES[case])
    await world.settle()
    made = [
        normalised(body)
        for (kind, namespace, _), body in sorted(
            world.kube.objects.items(), key=lambda i: (i[0][0].kind, i[0][2])
        )
        if namespace == NAMESPACE and kind not in (FLEETS, MODELS, SECRETS)
    ]
    assert any(body["kind"] == PODS.kind for body in made)
    text = yaml.safe_dump_all(made, sort_keys=False, width=100)
    check(text, GOLDEN / f"{case}.yaml")


async def test_a_resolver_pod() -> None:
    world = World()
    volume = {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}
    world.kube.user_write(model_body(resolved=False, template={"spec": {"volumes": [volume]}}))
    await world.reconcile()
    (pod,) = world.kube.pods(NAMESPACE)
    text = yaml.safe_dump(normalised(pod), sort_keys=False, width=100)
    check(text, GOLDEN / "resolver.yaml")
