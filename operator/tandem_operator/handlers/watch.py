"""Kopf's part: an index of every kind that is watched, and keys into the queue on every event.

No handler here writes, fails or waits. Kopf's high-level handlers are never used: they annotate and
finalize what they watch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from tandem_operator.keys import Key, keys_of
from tandem_operator.observe import CLUSTER, WATCHED, selector
from tandem_operator.resources import FLEETS, NODES, PODS, Resource

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
    if resource == NODES:  # large, and a node's taints are all that anybody asks for
        taints = (body.get("spec") or {}).get("taints") or []
        metadata = {key: body["metadata"][key] for key in ("name", "uid")}
        return {"metadata": metadata, "spec": {"taints": taints}}
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    kept = {key: body[key] for key in body if key != "metadata"}
    head = {"apiVersion": resource.api_version, "kind": resource.kind}
    return head | kept | {"metadata": metadata}


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

    @kopf.on.event(*_selector(resource), id=f"{resource.plural}_events", registry=registry)
    async def event(body: kopf.Body, type: str | None = None, **_: Any) -> None:
        namespace = body["metadata"]["namespace"]
        fleets = [fleet["metadata"]["name"] for fleet in cache.objects(FLEETS, namespace)]
        for key in keys_of(resource, body, fleets, gone=type == "DELETED"):
            add(key, SETTLE_S)


def _register_nodes(
    registry: kopf.OperatorRegistry, cache: IndexCache, add: Callable[[Key, float], None]
) -> None:
    """A node whose taints change concerns the fleets that have pods there; heartbeats nobody."""
    tainted: dict[str, frozenset[str]] = {}

    @kopf.on.event(*_selector(NODES), id="nodes_events", registry=registry)
    async def event(body: kopf.Body, type: str | None = None, **_: Any) -> None:
        name = str(body["metadata"]["name"])
        if type == "DELETED":
            # Autoscalers taint whatever they delete, and never use its name again.
            tainted.pop(name, None)
            return
        spec: Mapping[str, Any] = body.get("spec") or {}
        taints = frozenset(str(taint.get("key")) for taint in spec.get("taints") or ())
        if taints == tainted.get(name, frozenset()):
            return
        tainted[name] = taints
        for namespace in cache.namespaces(PODS):
            for pod in cache.objects(PODS, namespace):
                if (pod.get("spec") or {}).get("nodeName") == name:
                    for key in keys_of(PODS, pod, ()):
                        add(key, SETTLE_S)


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
