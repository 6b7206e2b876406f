"""Which keys an object's change concerns."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_operator.keys import Key, gateway_key, keys_of
from tandem_operator.resources import (
    BUDGETS,
    DEPLOYMENTS,
    FLEETS,
    MODELS,
    PODS,
    POOLS,
    REVISIONS,
    ROLE_BINDINGS,
    Resource,
)

GATEWAY = gateway_key("ns")


def fleet(name: str) -> Key:
    return Key("InferenceFleet", "ns", name)


def labelled(**labels: str) -> dict[str, str]:
    return {f"tandem.dev/{key}": value for key, value in labels.items() if key != "component"} | (
        {"app.kubernetes.io/component": labels["component"]} if "component" in labels else {}
    )


@pytest.mark.parametrize(
    ("resource", "labels", "keys"),
    [
        (MODELS, {}, {Key("Model", "ns", "x"), fleet("a"), fleet("b")}),
        (POOLS, labelled(fleet="a"), {fleet("a")}),
        (REVISIONS, labelled(fleet="a"), {fleet("a")}),
        (BUDGETS, labelled(fleet="b"), {fleet("b")}),
        (BUDGETS, {}, set()),
        (BUDGETS, labelled(component="gateway"), {GATEWAY}),
        (PODS, labelled(fleet="gone", component="runtime"), {fleet("gone")}),
        (PODS, labelled(model="m", component="resolver"), {Key("Model", "ns", "m")}),
        (PODS, labelled(component="gateway"), set()),
        (DEPLOYMENTS, {}, {GATEWAY, fleet("a"), fleet("b")}),
        (ROLE_BINDINGS, {}, {GATEWAY}),
    ],
)
def test_keys_of(resource: Resource, labels: dict[str, str], keys: set[Key]) -> None:
    body = {"metadata": {"namespace": "ns", "name": "x", "labels": labels}}
    assert keys_of(resource, body, ["a", "b"]) == keys


def test_a_deleted_fleet_passes_its_names_on() -> None:
    """Without a finalizer the last body of a deleted object does not say that it is one."""
    meta = {"namespace": "ns", "name": "a", "generation": 1}
    body = {"metadata": meta, "status": {"observedGeneration": 1}}
    assert fleet("b") in keys_of(FLEETS, body, ["a", "b"], gone=True)


@pytest.mark.parametrize(
    ("body", "everyone"),
    [
        ({"metadata": {"generation": 2}, "status": {"observedGeneration": 2}}, False),
        ({"metadata": {"generation": 2}, "status": {"observedGeneration": 1}}, True),
        ({"metadata": {"generation": 1}}, True),
        (
            {
                "metadata": {"generation": 1, "deletionTimestamp": "now"},
                "status": {"observedGeneration": 1},
            },
            True,
        ),
    ],
    ids=["status only", "edited", "new", "deleted"],
)
def test_a_fleets_spec_concerns_every_fleet(body: dict[str, Any], everyone: bool) -> None:
    body["metadata"] |= {"namespace": "ns", "name": "a"}
    others = {fleet("b")} if everyone else set()
    assert keys_of(FLEETS, body, ["a", "b"]) == {fleet("a"), GATEWAY} | others
