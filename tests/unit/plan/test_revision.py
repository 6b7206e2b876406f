"""Revisions: stable names, and what is part of them."""

from __future__ import annotations

from typing import Any

import pytest
from builders import RESOLVED, fleet_body
from tandem_operator.api.model import ResolvedModel
from tandem_operator.plan.revision import Refused, Rendered, Rollback, digest, render, rollback
from tandem_operator.plan.views import FleetView, fleet_view
from tandem_operator.settings import Settings

MODEL = ResolvedModel.model_validate(RESOLVED)


def fleet(annotations: dict[str, str] | None = None, **spec: Any) -> FleetView:
    body = fleet_body(**spec)
    body["metadata"] |= {
        "uid": "u",
        "generation": 1,
        "creationTimestamp": "2023-01-01T00:00:00Z",
        "annotations": annotations or {},
    }
    return fleet_view(body)


def revision(view: FleetView, model: ResolvedModel = MODEL, **settings: Any) -> str:
    rendered = render(view, "smollm2", model, None, Settings(**settings))
    assert isinstance(rendered, Rendered)
    return rendered.revision


def test_digests_do_not_change_with_the_order_of_keys_or_the_version_of_python() -> None:
    assert digest({"a": 1, "b": [2, "ü"]}) == digest({"b": [2, "ü"], "a": 1}) == "frvp4mxg"


ROLES = ("prefill", "decode")
ACCELERATOR = {"replicas": 2, "accelerator": {"resource": "nvidia.com/gpu", "count": 1}}


@pytest.mark.parametrize(
    "spec",
    [
        {"decode": ACCELERATOR},
        {"decode": {"replicas": 2, "template": {"spec": {"nodeSelector": {"a": "b"}}}}},
        {"prefill": None},
        {"cacheTiers": [{"name": "gpu", "medium": "Accelerator", "percent": 50}]},
    ],
    ids=["accelerator", "template", "no prefill", "cache"],
)
def test_what_is_rendered_makes_a_revision(spec: dict[str, Any]) -> None:
    assert revision(fleet(**spec)) != revision(fleet())


def accelerators(count: int) -> dict[str, Any]:
    return {"replicas": 1, "accelerator": {"resource": "nvidia.com/gpu", "count": count}}


def test_the_accelerators_of_a_pod_share_the_model() -> None:
    """Each pool its own number; one accelerator is told nothing, so that no revision changes."""
    view = fleet(prefill=accelerators(1), decode=accelerators(3))
    rendered = render(view, "smollm2", MODEL, None, Settings())
    assert isinstance(rendered, Rendered)
    prefill, decode = (rendered.templates[role]["spec"]["containers"][0] for role in ROLES)
    assert decode["resources"] == {"limits": {"nvidia.com/gpu": "3"}}
    assert decode["args"][-2:] == ["--tensor-parallel", "3"]
    assert decode["volumeMounts"][-1] == {"name": "shared-memory", "mountPath": "/dev/shm"}
    assert "--tensor-parallel" not in prefill["args"]
    assert "/dev/shm" not in [mount["mountPath"] for mount in prefill["volumeMounts"]]


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_accelerators_that_cannot_share_the_model(pool: str) -> None:
    refused = render(fleet(**{pool: accelerators(2)}), "smollm2", MODEL, None, Settings())
    assert refused == Refused(
        f"{pool}.accelerator.count is 2, but so many cannot share Model smollm2 evenly (tensor "
        "parallel); use 1, 3"
    )


def test_the_weights_and_the_image_make_a_revision() -> None:
    other = MODEL.model_copy(update={"digest": "another"})
    assert revision(fleet(), other) != revision(fleet())
    assert revision(fleet(), runtime_image="tandem.dev/runtime:9") != revision(fleet())


def test_a_restart_makes_a_revision() -> None:
    assert revision(fleet({"tandem.dev/restartedAt": "now"})) != revision(fleet())


@pytest.mark.parametrize(
    "spec",
    [
        {"decode": {"replicas": 9}},
        {"decode": {}},
        {"rollout": {"maxSurge": 5}},
        {"disruption": {"drainTimeoutSeconds": 5, "maxUnavailable": 2}},
        {"objectives": {"timeToFirstToken": {"targetMilliseconds": 5}}},
    ],
    ids=["replicas", "no replicas", "rollout", "disruption", "objectives"],
)
def test_the_rest_does_not(spec: dict[str, Any]) -> None:
    assert revision(fleet(**spec)) == revision(fleet())


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ('{"from": "a", "to": "b"}', Rollback("a", "b")),
        ("", None),
        ("nonsense", None),
        ('{"from": "a"}', None),
        ("[]", None),
    ],
)
def test_rollback(text: str, asked: Rollback | None) -> None:
    assert rollback(fleet({"tandem.dev/rollback": text})) == asked
