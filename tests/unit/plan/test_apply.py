"""When a configuration has to be applied."""

from __future__ import annotations

import copy
from typing import Any

from tandem_operator.plan.apply import apply_if_needed, covers

MANIFEST: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "a", "namespace": "b", "ownerReferences": [{"uid": "1"}]},
    "spec": {"ports": [{"port": 80}], "type": "ClusterIP"},
}


def live() -> dict[str, Any]:
    """What the server makes of it: defaults beside, another owner."""
    (action,) = apply_if_needed(MANIFEST, None)
    body = copy.deepcopy(action.manifest)
    body["metadata"] |= {"uid": "u", "ownerReferences": [{"uid": "2"}, {"uid": "1", "x": 1}]}
    body["spec"]["ports"][0]["protocol"] = "TCP"
    body["spec"]["clusterIP"] = "10.0.0.1"
    return body


def test_what_is_as_configured_is_left_alone() -> None:
    assert apply_if_needed(MANIFEST, live()) == ()


def test_a_changed_field_is_applied() -> None:
    body = live()
    body["spec"]["type"] = "NodePort"
    assert len(apply_if_needed(MANIFEST, body)) == 1


def test_a_field_that_is_not_configured_any_more_is_noticed() -> None:
    narrower = copy.deepcopy(MANIFEST)
    del narrower["spec"]["type"]
    assert len(apply_if_needed(narrower, live())) == 1


def test_an_owner_that_is_missing_is_noticed() -> None:
    body = live()
    body["metadata"]["ownerReferences"] = [{"uid": "2"}]
    assert len(apply_if_needed(MANIFEST, body)) == 1


def test_covers() -> None:
    assert covers({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}], "d": 3})
    assert not covers({"a": [{"b": 1}]}, {"a": [{"b": 1}, {"b": 2}]})
    assert not covers({"a": {}}, {"a": None})
    assert not covers({"a": 1}, {})
