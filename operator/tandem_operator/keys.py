"""What is reconciled: one key, one plan. And which keys an object's change concerns (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem_runtime.contract import (
    COMPONENT_GATEWAY,
    COMPONENT_RESOLVER,
    COMPONENT_RUNTIME,
    LABEL_COMPONENT,
    LABEL_FLEET,
    LABEL_MODEL,
)

from tandem_operator.resources import (
    BUDGETS,
    CACHED_CONTEXTS,
    DEPLOYMENTS,
    FLEETS,
    MODELS,
    PODS,
    POOLS,
    REVISIONS,
    SCALING_POLICIES,
    SERVICES,
    Resource,
)


@dataclass(frozen=True)
class Key:
    """One unit of reconciliation. A gateway has its namespace's name; all nodes are one unit,
    without a namespace, since the brakes are over all of them."""

    kind: Literal["Model", "InferenceFleet", "Gateway", "Nodes", "CachedContext"]
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


NODES_KEY = Key("Nodes", "", "nodes")


def gateway_key(namespace: str) -> Key:
    """The key of a namespace's gateway."""
    return Key("Gateway", namespace, namespace)


def keys_of(
    resource: Resource, body: Mapping[str, Any], fleets: Iterable[str], *, gone: bool = False
) -> set[Key]:
    """The keys that a change of this object concerns; `fleets` are those of its namespace.

    `gone`: it was deleted, which its body does not say when nothing held the deletion up.
    """
    meta = body["metadata"]
    namespace, name, labels = meta["namespace"], meta["name"], meta.get("labels") or {}
    every_fleet = {Key("InferenceFleet", namespace, fleet) for fleet in fleets}
    if resource == FLEETS:
        own = {Key("InferenceFleet", namespace, name), gateway_key(namespace)}
        observed = (body.get("status") or {}).get("observedGeneration")
        # Another fleet's spec decides who serves a name; its status does not.
        moved = gone or observed != meta.get("generation") or "deletionTimestamp" in meta
        return own | (every_fleet if moved else set())
    if resource == CACHED_CONTEXTS:
        return {Key("CachedContext", namespace, name)}
    if resource == SCALING_POLICIES:
        return every_fleet
    if resource == MODELS:
        return {Key("Model", namespace, name)} | every_fleet
    if resource == BUDGETS and labels.get(LABEL_COMPONENT) == COMPONENT_GATEWAY:
        return {gateway_key(namespace)}
    if resource in (POOLS, REVISIONS, BUDGETS):
        return _labelled("InferenceFleet", namespace, labels.get(LABEL_FLEET))
    if resource == PODS:
        return _keys_of_pod(namespace, labels)
    if resource in (DEPLOYMENTS, SERVICES):
        return {gateway_key(namespace)} | every_fleet
    return {gateway_key(namespace)}


def _keys_of_pod(namespace: str, labels: Mapping[str, str]) -> set[Key]:
    component = labels.get(LABEL_COMPONENT)
    if component == COMPONENT_RUNTIME:
        return _labelled("InferenceFleet", namespace, labels.get(LABEL_FLEET))
    if component == COMPONENT_RESOLVER:
        return _labelled("Model", namespace, labels.get(LABEL_MODEL))
    return set()


def _labelled(
    kind: Literal["Model", "InferenceFleet"], namespace: str, name: str | None
) -> set[Key]:
    return {Key(kind, namespace, name)} if name else set()
