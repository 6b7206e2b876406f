"""Partial templates laid over ours."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_operator.plan.merge import merge, refusal


def test_maps_deep_lists_by_name_or_mount_path() -> None:
    base = {
        "spec": {
            "containers": [
                {
                    "name": "runtime",
                    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                    "volumeMounts": [{"name": "x", "mountPath": "/a"}],
                }
            ],
            "volumes": [{"name": "x", "secret": {}}],
        }
    }
    override = {
        "spec": {
            "nodeSelector": {"kind": "gpu"},
            "containers": [
                {
                    "name": "runtime",
                    "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
                    "volumeMounts": [{"name": "x", "mountPath": "/b"}],
                },
                {"name": "sidecar", "image": "busybox"},
            ],
        }
    }
    container, sidecar = merge(base, override)["spec"]["containers"]
    assert [(e["name"], e["value"]) for e in container["env"]] == [
        ("A", "1"),
        ("B", "3"),
        ("C", "4"),
    ]
    # Two mounts may share a volume: they are told apart by where they are.
    assert [m["mountPath"] for m in container["volumeMounts"]] == ["/a", "/b"]
    assert sidecar["name"] == "sidecar"
    assert merge(base, override)["spec"]["nodeSelector"] == {"kind": "gpu"}


def test_neither_side_is_changed() -> None:
    base: dict[str, Any] = {"a": {"b": [1]}}
    override: dict[str, Any] = {"a": {"c": 2}}
    merge(base, override)["a"]["b"] = "x"
    assert base == {"a": {"b": [1]}}
    assert override == {"a": {"c": 2}}


@pytest.mark.parametrize(
    ("base", "override", "merged"),
    [
        (["--a"], ["--b"], ["--b"]),
        ([{"key": 1}], [{"key": 2}], [{"key": 2}]),
        ([], [{"name": "a"}], [{"name": "a"}]),
        ("text", "other", "other"),
        ({"a": 1}, "text", "text"),
    ],
    ids=["plain list", "no known key", "empty", "string", "other type"],
)
def test_what_cannot_be_merged_is_replaced(base: Any, override: Any, merged: Any) -> None:
    assert merge({"x": base}, {"x": override}) == {"x": merged}


def serving(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "runtime", **fields}]}}


def test_arguments_of_the_serving_container_are_added_to_ours() -> None:
    ours = serving(command=["python"], args=["--role", "both"])
    models = merge(ours, serving(args=["--max-running", "8"]))
    (container,) = merge(models, serving(args=["--pace=h100"]))["spec"]["containers"]
    assert container["args"] == ["--role", "both", "--max-running", "8", "--pace=h100"]
    # Another program has arguments of its own.
    (container,) = merge(ours, serving(command=["sh"], args=["-c"]))["spec"]["containers"]
    assert container["args"] == ["-c"]
    both = {"name": "sidecar", "args": ["a"]}
    other = merge({"x": [both]}, {"x": [both | {"args": ["b"]}]})
    assert other["x"][0]["args"] == ["b"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (serving(args=["--max-running", "8", "--role=both"]), "the argument --role, which belongs"),
        (serving(args="--pace=h100"), ".args must be a list of strings"),
        (serving(args=["--max-running", 8]), ".args must be a list of strings"),
        ({"metadata": {"labels": {"tandem.dev/role": "x"}}}, "labels sets tandem.dev/role"),
        (
            {"metadata": {"annotations": {"tandem.dev/draining": "x"}}},
            "annotations sets tandem.dev/draining",
        ),
        ({"spec": {"terminationGracePeriodSeconds": 5}}, "disruption.drainTimeoutSeconds"),
        (
            {"spec": {"containers": [{"name": "runtime", "env": [{"name": "TANDEM_POD_IP"}]}]}},
            "the environment variable TANDEM_POD_IP",
        ),
    ],
)
def test_what_is_ours_is_refused(template: dict[str, Any], sentence: str) -> None:
    said = refusal(template, "decode.template")
    assert said is not None
    assert said.startswith("decode.template")
    assert sentence in said


RUNTIME = {"name": "runtime"}


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ({"metadata": None}, ".metadata must be an object"),
        ({"metadata": {"labels": ["a"]}}, ".metadata.labels must be an object"),
        ({"spec": []}, ".spec must be an object"),
        ({"spec": {"containers": None}}, ".spec.containers must be a list"),
        ({"spec": {"containers": ["x"]}}, "have a name (the one that serves is runtime)"),
        ({"spec": {"containers": [{"image": "x"}]}}, "write the missing name"),
        ({"spec": {"volumes": [{"emptyDir": {}}]}}, ".spec.volumes must be a list"),
        ({"spec": {"containers": [RUNTIME | {"env": None}]}}, "containers[runtime].env must"),
        ({"spec": {"containers": [RUNTIME | {"volumeMounts": [{"name": "x"}]}]}}, "a mountPath"),
        ({"spec": {"containers": [RUNTIME | {"ports": [{"containerPort": 9}]}]}}, ".ports must"),
        ({"spec": {"containers": [RUNTIME | {"resources": "x"}]}}, ".resources must be an object"),
        (
            {"spec": {"containers": [RUNTIME | {"resources": {"limits": "cpu"}}]}},
            ".resources.limits must be an object",
        ),
    ],
)
def test_what_would_replace_ours_instead_of_adding_to_it_is_refused(
    template: dict[str, Any], sentence: str
) -> None:
    said = refusal(template, "decode.template")
    assert said is not None
    assert said.startswith("decode.template")
    assert sentence in said


def test_what_is_the_users_is_not() -> None:
    template = {
        "metadata": {
            "labels": {"team": "a"},
            "annotations": {"tandem.dev/restartedAt": "now", "prometheus.io/scrape": "true"},
        },
        "spec": {
            "containers": [
                {"name": "runtime", "env": [{"name": "HF_HOME"}, {"name": "TANDEM_MODEL_CACHE"}]},
                {
                    "name": "sidecar",
                    "env": [{"name": "TANDEM_X"}],
                    "ports": [{"containerPort": 9}],
                },
            ]
        },
    }
    assert refusal(template, "decode.template") is None
    assert refusal({}, "decode.template") is None
