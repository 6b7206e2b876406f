from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.agent.environment import (
    MissingSourceError,
    References,
    Sources,
    argv,
    build,
    expand,
    references,
)


def sources(
    config_maps: Mapping[str, Mapping[str, str] | None] | None = None,
    secrets: Mapping[str, Mapping[str, str] | None] | None = None,
) -> Sources:
    return Sources(
        config_maps or {},
        secrets or {},
        lambda path: f"<{path}>",
        lambda reference: f"<{reference['resource']}>",
    )


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("plain", "plain"),
        ("$(A)", "1"),
        ("x$(A)y$(B)", "x1y2"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A ${A} $", "$A ${A} $"),
        ("$(A", "$(A"),
        ("$()", "$()"),
    ],
)
def test_expand(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == expanded


@given(st.text(alphabet=st.characters(exclude_characters="$")))
def test_text_without_dollars_stays(text: str) -> None:
    assert expand(text, {"A": "1"}) == text


def test_values_come_in_order_and_see_what_stands_before() -> None:
    container: dict[str, Any] = {
        "envFrom": [
            {"configMapRef": {"name": "cm"}, "prefix": "P_"},
            {"secretRef": {"name": "s"}},
        ],
        "env": [
            {"name": "GIVEN", "value": "own"},
            {"name": "A", "value": "$(P_K)-$(TOKEN)-$(LATER)"},
            {"name": "LATER", "value": "$(A)"},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "TOKEN"}}},
            {"name": "EMPTY"},
        ],
    }
    env = build(
        container,
        {"GIVEN": "image", "PATH": "/bin"},
        sources({"cm": {"K": "v"}}, {"s": {"TOKEN": "t"}}),
    )
    assert env == {
        "GIVEN": "own",
        "PATH": "/bin",
        "P_K": "v",
        "TOKEN": "t",
        "A": "v-t-$(LATER)",
        "LATER": "v-t-$(LATER)",
        "IP": "<status.podIP>",
        "CPU": "<limits.cpu>",
        "KEY": "t",
        "EMPTY": "",
    }


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"configMapKeyRef": {"name": "no", "key": "k"}}, 'configmap "no" not found'),
        ({"secretKeyRef": {"name": "s", "key": "k"}}, 'couldn\'t find key k in secret "s"'),
        ({"fileKeyRef": {}}, "unsupported valueFrom"),
    ],
)
def test_a_missing_source_is_named(entry: dict[str, Any], sentence: str) -> None:
    container = {"env": [{"name": "A", "valueFrom": entry}]}
    with pytest.raises(MissingSourceError, match=sentence):
        build(container, {}, sources({"no": None}, {"s": {}}))


def test_optional_sources_may_be_missing() -> None:
    container: dict[str, Any] = {
        "envFrom": [{"secretRef": {"name": "no", "optional": True}}],
        "env": [
            {
                "name": "A",
                "valueFrom": {"configMapKeyRef": {"name": "no", "key": "k", "optional": True}},
            }
        ],
    }
    assert build(container, {}, sources({"no": None}, {"no": None})) == {}


def test_references() -> None:
    container: dict[str, Any] = {
        "envFrom": [{"configMapRef": {"name": "a"}}, {"secretRef": {"name": "b"}}],
        "env": [
            {"name": "X", "value": "1"},
            {"name": "Y", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
            {"name": "Z", "valueFrom": {"secretKeyRef": {"name": "d", "key": "k"}}},
        ],
    }
    assert references(container) == References(frozenset("ac"), frozenset("bd"))


def test_command_replaces_the_entry_point_and_args_follow() -> None:
    env = {"N": "3"}
    assert argv({"command": ["run"], "args": ["-n", "$(N)"]}, ["entry"], env) == ["run", "-n", "3"]
    assert argv({"args": ["x"]}, ["entry"], env) == ["entry", "x"]
    assert argv({}, [], env) == []
