"""Kopf's part: an index of every kind that is watched, and keys into the queue on every event.

No handler here writes, fails or waits. Kopf's high-level handlers are never used: they annotate and
finalize what they watch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import kopf
from tandem_runtime.contract import GROUP

from tandem_operator.api.node_health import NodeHealthPolicySpec, NodeHealthPolicyStatus
from tandem_operator.keys import NODES_KEY, Key, keys_of
from tandem_operator.plan.nodes.repair import Repair, repair_of
from tandem_operator.readers import CLUSTER, WATCHED, selector
from tandem_operator.resources import FLEETS, NODE_HEALTH_POLICIES, NODES, PODS, Resource

SETTLE_S = 0.05
"""Events come in bursts, and the cache is a moment behind our own writes."""

Body = Mapping[str, Any]
Indices = Mapping[str, Mapping[str, Any]]


class IndexCache:
    """The objects that Kopf's indices hold; empty until Kopf has started."""

    def __init__(self) -> None:
        self._indices: Indices = {}

    def adopt(self, indices: Indices) -> None:
        """Read from these indices from now on."""
        self._indices = indices

    def objects(self, resource: Resource, namespace: str) -> list[Body]:
        """What the watch has seen and not seen deleted."""
        index = self._indices.get(index_name(resource), {})
        return list(index[namespace]) if namespace in index else []

    def namespaces(self, resource: Resource) -> list[str]:
        """Namespaces that have objects of this kind."""
        return sorted(self._indices.get(index_name(resource), {}))


def index_name(resource: Resource) -> str:
    """The id of a kind's index."""
    return f"{resource.plural}_by_namespace"


def trimmed(resource: Resource, body: Body) -> dict[str, Any]:
    """A body as it is kept: without managedFields, the largest part and of no use to a plan."""
    if resource == NODES:
        return _trimmed_node(body)
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    kept = {key: body[key] for key in body if key != "metadata"}
    head = {"apiVersion": resource.api_version, "kind": resource.kind}
    return head | kept | {"metadata": metadata}


OWN_ANNOTATIONS = f"{GROUP}/"


def _trimmed_node(body: Body) -> dict[str, Any]:
    """Nodes are large; what the plans ask for is what says whether pods can be there."""
    meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    annotations = meta.get("annotations") or {}
    conditions = status.get("conditions") or ()
    allocatable = (status.get("allocatable") or {}).items()
    return {
        "metadata": {
            "name": meta["name"],
            "uid": meta["uid"],
            "resourceVersion": meta.get("resourceVersion", ""),
            "annotations": {k: v for k, v in annotations.items() if k.startswith(OWN_ANNOTATIONS)},
        },
        "spec": {
            "taints": [dict(taint) for taint in spec.get("taints") or ()],
            "unschedulable": bool(spec.get("unschedulable")),
        },
        "status": {
            "conditions": [{"type": c["type"], "status": c["status"]} for c in conditions],
            "allocatable": {k: v for k, v in allocatable if "/" in k},
        },
    }


def register(
    registry: kopf.OperatorRegistry, cache: IndexCache, add: Callable[[Key, float], None]
) -> None:
    """Register an index and an event handler for every watched kind."""

    @kopf.on.startup(id="adopt_indices", registry=registry)
    async def startup(**indices: Any) -> None:
        cache.adopt({name: indices[name] for name in map(index_name, WATCHED)})

    for resource in WATCHED:
        _register(registry, resource, cache, add)


def _selector(resource: Resource) -> tuple[str, str, str]:
    group, _, version = resource.api_version.rpartition("/")
    return group, version, resource.plural


def _register(
    registry: kopf.OperatorRegistry,
    resource: Resource,
    cache: IndexCache,
    add: Callable[[Key, float], None],
) -> None:
    @kopf.index(*_selector(resource), id=index_name(resource), registry=registry)
    def index(body: kopf.Body, **_: Any) -> dict[str, Any]:
        return {body["metadata"].get("namespace", CLUSTER): trimmed(resource, body)}

    if resource == NODES:
        _register_nodes(registry, cache, add)
        return
    if resource == NODE_HEALTH_POLICIES:
        _register_policies(registry, cache, add)
        return

    @kopf.on.event(*_selector(resource), id=f"{resource.plural}_events", registry=registry)
    async def event(body: kopf.Body, type: str | None = None, **_: Any) -> None:
        namespace = body["metadata"]["namespace"]
        fleets = [fleet["metadata"]["name"] for fleet in cache.objects(FLEETS, namespace)]
        for key in keys_of(resource, body, fleets, gone=type == "DELETED"):
            add(key, SETTLE_S)


def _register_nodes(
    registry: kopf.OperatorRegistry, cache: IndexCache, add: Callable[[Key, float], None]
) -> None:
    """A node that changes concerns the plan for the nodes, and with its taints the fleets that have
    pods there; heartbeats concern nobody."""
    known: dict[str, dict[str, Any]] = {}

    @kopf.on.event(*_selector(NODES), id="nodes_events", registry=registry)
    async def event(body: kopf.Body, type: str | None = None, **_: Any) -> None:
        name = str(body["metadata"]["name"])
        if type == "DELETED":
            known.pop(name, None)
            for key in {NODES_KEY} | _fleets_on(cache, {name}, frozenset()):
                add(key, SETTLE_S)
            return
        now = _trimmed_node(body)
        now["metadata"].pop("resourceVersion")
        before = known.get(name)
        if now == before:
            return
        known[name] = now
        add(NODES_KEY, SETTLE_S)
        if _taint_keys(now) != _taint_keys(before):
            for key in _fleets_on(cache, {name}, frozenset()):
                add(key, SETTLE_S)


def _taint_keys(node: dict[str, Any] | None) -> set[str]:
    return {str(taint.get("key")) for taint in node["spec"]["taints"]} if node else set()


def _register_policies(
    registry: kopf.OperatorRegistry, cache: IndexCache, add: Callable[[Key, float], None]
) -> None:
    """A policy concerns the plan for the nodes; what it has in repair, the fleets there."""
    known = Repair()

    @kopf.on.event(*_selector(NODE_HEALTH_POLICIES), id="policies_events", registry=registry)
    async def event(body: kopf.Body, type: str | None = None, **_: Any) -> None:
        nonlocal known
        add(NODES_KEY, SETTLE_S)
        before, known = known, Repair() if type == "DELETED" else _repair(body)
        nodes, pods = before.nodes ^ known.nodes, before.pods ^ known.pods
        for key in _fleets_on(cache, nodes, pods):
            add(key, SETTLE_S)


def _repair(body: Body) -> Repair:
    spec = NodeHealthPolicySpec.model_validate(body["spec"])
    return repair_of(spec, NodeHealthPolicyStatus.model_validate(body.get("status") or {}))


def _fleets_on(cache: IndexCache, nodes: Set[str], uids: Set[str]) -> set[Key]:
    """The keys of fleets with pods on these nodes, or with these pods."""
    if not nodes and not uids:
        return set()
    return {
        key
        for namespace in cache.namespaces(PODS)
        for pod in cache.objects(PODS, namespace)
        if (pod.get("spec") or {}).get("nodeName") in nodes or pod["metadata"].get("uid") in uids
        for key in keys_of(PODS, pod, ())
    }


def configure(settings: kopf.OperatorSettings) -> None:
    """Kopf's settings: no writes, server-side filters, streams that notice silence."""
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = 600
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.queueing.worker_limit = 50
    for resource in WATCHED:
        labels = selector(resource)
        if labels:
            text = ",".join(f"{key}={value}" for key, value in labels.items())
            settings.watching.label_selectors[_selector(resource)] = text
