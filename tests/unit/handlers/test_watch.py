"""Kopf's part: indices, keys on events, and nothing that writes."""

from __future__ import annotations

import asyncio
from typing import Any

import kopf
from tandem_operator.handlers.watch import IndexCache, configure, register, trimmed
from tandem_operator.keys import NODES_KEY, Key
from tandem_operator.readers import WATCHED, selector
from tandem_operator.resources import (
    CACHED_CONTEXTS,
    FLEETS,
    MODELS,
    NODE_HEALTH_POLICIES,
    NODES,
    PODS,
    SCALING_POLICIES,
)


def test_only_an_index_and_an_event_handler_are_registered_for_a_kind() -> None:
    registry = kopf.OperatorRegistry()
    register(registry, IndexCache(), lambda key, after_s: None)
    assert len(registry._indexing.get_all_handlers()) == len(WATCHED)
    assert len(registry._watching.get_all_handlers()) == len(WATCHED)
    # What would write: finalizers, annotations, statuses.
    assert not registry._changing.get_all_handlers()
    assert not registry._spawning.get_all_handlers()
    assert not registry._webhooks.get_all_handlers()


def test_an_event_queues_the_keys_that_it_concerns() -> None:
    registry, added = kopf.OperatorRegistry(), []
    cache = IndexCache()
    fleets = {"team": [{"metadata": {"name": "a"}}, {"metadata": {"name": "b"}}]}
    cache.adopt({"inferencefleets_by_namespace": fleets})
    register(registry, cache, lambda key, after_s: added.append(key))
    handler = next(
        h for h in registry._watching.get_all_handlers() if h.id.startswith("models_events")
    )
    body: Any = {"metadata": {"namespace": "team", "name": "m"}}
    asyncio.run(handler.fn(body=body))  # type: ignore[arg-type, call-arg]
    fleets_keys = {Key("InferenceFleet", "team", name) for name in ("a", "b")}
    assert set(added) == {Key("Model", "team", "m")} | fleets_keys


def test_a_node_concerns_the_fleets_on_it_when_its_taints_change() -> None:
    registry, added = kopf.OperatorRegistry(), []
    cache = IndexCache()

    def pod(fleet: str, node: str) -> dict[str, Any]:
        labels = {"app.kubernetes.io/component": "runtime", "tandem.dev/fleet": fleet}
        meta = {"name": fleet, "namespace": "team", "labels": labels}
        return {"metadata": meta, "spec": {"nodeName": node}}

    cache.adopt({"pods_by_namespace": {"team": [pod("here", "n1"), pod("elsewhere", "n2")]}})
    register(registry, cache, lambda key, after_s: added.append(key))
    handler = next(h for h in registry._watching.get_all_handlers() if h.id == "nodes_events")

    def event(*taints: str, type: str = "MODIFIED", **status: Any) -> list[Key]:
        added.clear()
        spec = {"taints": [{"key": taint} for taint in taints]} if taints else {}
        body: Any = {"metadata": {"name": "n1", "uid": "u"}, "spec": spec, "status": status}
        asyncio.run(handler.fn(body=body, type=type))  # type: ignore[arg-type, call-arg]
        return list(added)

    here = [NODES_KEY, Key("InferenceFleet", "team", "here")]
    assert event() == [NODES_KEY]
    assert event("node.kubernetes.io/unschedulable") == here
    assert event("node.kubernetes.io/unschedulable") == [], "a heartbeat"
    ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": "now"}
    assert event("node.kubernetes.io/unschedulable", conditions=[ready]) == [NODES_KEY]
    ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": "later"}
    assert event("node.kubernetes.io/unschedulable", conditions=[ready]) == [], "a heartbeat"
    assert event() == here
    # One that comes back under its name is another node.
    event("node.kubernetes.io/unschedulable")
    assert set(event("node.kubernetes.io/unschedulable", type="DELETED")) == set(here)
    assert event("node.kubernetes.io/unschedulable") == here


def test_a_policy_concerns_the_fleets_on_the_nodes_that_it_has_in_repair() -> None:
    registry, added = kopf.OperatorRegistry(), []
    cache = IndexCache()
    labels = {"app.kubernetes.io/component": "runtime", "tandem.dev/fleet": "here"}
    pod = {"metadata": {"name": "p", "uid": "u", "namespace": "team", "labels": labels}}
    cache.adopt({"pods_by_namespace": {"team": [pod | {"spec": {"nodeName": "n1"}}]}})
    register(registry, cache, lambda key, after_s: added.append(key))
    handler = next(h for h in registry._watching.get_all_handlers() if h.id == "policies_events")

    def event(*nodes: dict[str, Any], type: str = "MODIFIED") -> list[Key]:
        added.clear()
        phase = {"uid": "u", "since": "2026-01-01T00:00:00Z", "message": ""}
        body: Any = {
            "metadata": {"name": "default"},
            "spec": {"mode": "Active"},
            "status": {"nodes": [phase | node for node in nodes]},
        }
        asyncio.run(handler.fn(body=body, type=type))  # type: ignore[arg-type, call-arg]
        return list(added)

    here = [NODES_KEY, Key("InferenceFleet", "team", "here")]
    assert event() == [NODES_KEY]
    assert event({"name": "n1", "phase": "Suspect"}) == [NODES_KEY]
    assert event({"name": "n1", "phase": "Draining"}) == here
    assert event({"name": "n1", "phase": "Drained"}) == [NODES_KEY]
    assert event(type="DELETED") == here
    assert event({"name": "n2", "phase": "Draining", "pods": ["u"]}) == here


def test_of_nodes_is_kept_what_says_whether_pods_can_be_there() -> None:
    note = {"tandem.dev/cordoned": "why"}
    ready = {"type": "Ready", "status": "True"}
    body = {
        "metadata": {
            "name": "n",
            "uid": "u",
            "resourceVersion": "7",
            "labels": {"a": "b"},
            "annotations": note | {"volumes.kubernetes.io/attached": "true"},
        },
        "spec": {"podCIDR": "10.0.0.0/24", "taints": [{"key": "k"}], "unschedulable": True},
        "status": {
            "images": ["many"],
            "conditions": [ready | {"lastHeartbeatTime": "now"}],
            "allocatable": {"cpu": "8", "nvidia.com/gpu": "7"},
        },
    }
    kept = {
        "metadata": {"name": "n", "uid": "u", "resourceVersion": "7", "annotations": note},
        "spec": {"taints": [{"key": "k"}], "unschedulable": True},
        "status": {"conditions": [ready], "allocatable": {"nvidia.com/gpu": "7"}},
    }
    assert trimmed(NODES, body) == kept


def test_the_cache_is_empty_before_kopf_starts() -> None:
    cache = IndexCache()
    assert cache.objects(PODS, "team") == []
    assert cache.namespaces(PODS) == []


def test_bodies_are_kept_without_managed_fields_and_with_their_kind() -> None:
    body = {"metadata": {"name": "p", "managedFields": [1]}, "spec": {"a": 1}}
    assert trimmed(PODS, body) == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"a": 1},
    }


EVERYONES = (
    CACHED_CONTEXTS,
    FLEETS,
    MODELS,
    NODE_HEALTH_POLICIES,
    NODES,
    SCALING_POLICIES,
)


def test_kopf_writes_nothing_and_filters_on_the_server() -> None:
    settings = kopf.OperatorSettings()
    configure(settings)
    assert settings.posting.enabled is False
    assert settings.peering.standalone is True
    ours = {"app.kubernetes.io/managed-by": "tandem"}
    for resource in WATCHED:
        everyones = resource in EVERYONES
        assert selector(resource) == ({} if everyones else ours)
    filtered = [r for r in WATCHED if selector(r)]
    assert len(settings.watching.label_selectors) == len(filtered)
