"""The small manifests: owner references, Pools, their PodDisruptionBudgets and revisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_runtime.contract import (
    COMPONENT_RUNTIME,
    LABEL_COMPONENT,
    LABEL_FLEET,
    LABEL_POOL,
    LABEL_REVISION,
    LABEL_ROLE,
)

from tandem_operator.names import LABEL_MANAGED_BY, LABEL_NAME, MANAGED_BY
from tandem_operator.plan.actions import Manifest
from tandem_operator.plan.views import FleetView, PoolView
from tandem_operator.resources import BUDGETS, POOLS, REVISIONS, Ref

COMMON_LABELS = {LABEL_MANAGED_BY: MANAGED_BY, LABEL_NAME: MANAGED_BY}


def owner_reference(owner: Ref, *, controller: bool) -> dict[str, Any]:
    """An owner reference; only a controller's blocks a foreground deletion of the owner."""
    reference: dict[str, Any] = {
        "apiVersion": owner.resource.api_version,
        "kind": owner.resource.kind,
        "name": owner.name,
        "uid": owner.uid,
    }
    return reference | ({"controller": True, "blockOwnerDeletion": True} if controller else {})


def pool_name(fleet: str, role: str) -> str:
    """FLEET-prefill or FLEET-decode; a pool that does both keeps the decode pool's name, so that
    adding or removing `prefill` is a rollout and not another pool."""
    return f"{fleet}-prefill" if role == "prefill" else f"{fleet}-decode"


def pool_selector(fleet: str, pool: str) -> dict[str, str]:
    """Labels that select a pool's pods and no other's."""
    return {LABEL_COMPONENT: COMPONENT_RUNTIME, LABEL_FLEET: fleet, LABEL_POOL: pool}


def selector_text(selector: Mapping[str, str]) -> str:
    """A label selector as /scale and kubectl write it."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector.items()))


def pool_manifest(fleet: FleetView, role: str, revision: str) -> Manifest:
    """The Pool as the fleet applies it: never its replicas (docs/design/replicas.md)."""
    name = pool_name(fleet.name, role)
    return {
        "apiVersion": POOLS.api_version,
        "kind": POOLS.kind,
        "metadata": {
            "name": name,
            "namespace": fleet.namespace,
            "labels": {**COMMON_LABELS, LABEL_FLEET: fleet.name, LABEL_ROLE: role},
            "ownerReferences": [owner_reference(fleet.ref, controller=True)],
        },
        "spec": {"fleetRef": {"name": fleet.name}, "role": role, "revision": revision},
    }


def budget_manifest(fleet: FleetView, pool: PoolView) -> Manifest:
    """The pool's PodDisruptionBudget."""
    return {
        "apiVersion": BUDGETS.api_version,
        "kind": BUDGETS.kind,
        "metadata": {
            "name": pool.name,
            "namespace": pool.namespace,
            "labels": {**COMMON_LABELS, LABEL_FLEET: fleet.name, LABEL_POOL: pool.name},
            "ownerReferences": [owner_reference(pool.ref, controller=True)],
        },
        "spec": {
            "maxUnavailable": fleet.spec.disruption.max_unavailable,
            # A pod that is not Ready serves nobody: it must not keep a node from being drained.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": pool_selector(fleet.name, pool.name)},
        },
    }


def revision_manifest(
    fleet: FleetView, pool: PoolView, revision: str, number: int, template: Manifest
) -> Manifest:
    """The ControllerRevision that keeps a pool's pod template of one revision."""
    return {
        "apiVersion": REVISIONS.api_version,
        "kind": REVISIONS.kind,
        "metadata": {
            "name": f"{pool.name}-{revision}",
            "namespace": pool.namespace,
            "labels": {
                **COMMON_LABELS,
                LABEL_FLEET: fleet.name,
                LABEL_POOL: pool.name,
                LABEL_REVISION: revision,
            },
            "ownerReferences": [owner_reference(pool.ref, controller=True)],
        },
        "revision": number,
        "data": {"template": template},
    }
