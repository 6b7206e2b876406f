"""`tandem rollout`: what it decides before it asks the cluster for anything."""

from __future__ import annotations

from typing import Any

import pytest
from tandem.kubectl import CommandFailed, fleet_name
from tandem.rollout import (
    Revision,
    progress,
    refuse_restart,
    revisions,
    undo_target,
)


@pytest.mark.parametrize("argument", ["chat", "fleet/chat", "inferencefleet/chat"])
def test_fleet_name(argument: str) -> None:
    assert fleet_name(argument) == "chat"


def test_another_kind_is_refused() -> None:
    with pytest.raises(CommandFailed, match="deployment/chat is not a fleet: write fleet/NAME"):
        fleet_name("deployment/chat")


def record(revision: str, number: int, model: str = "m") -> dict[str, Any]:
    return {
        "metadata": {
            "labels": {"tandem.dev/revision": revision},
            "creationTimestamp": f"t{number}",
        },
        "revision": number,
        "data": {
            "template": {
                "metadata": {"labels": {"tandem.dev/model": model}},
                "spec": {
                    "containers": [
                        {"name": "sidecar", "image": "x"},
                        {"name": "runtime", "image": "y"},
                    ]
                },
            }
        },
    }


def test_pools_revisions_become_the_fleets() -> None:
    items = [record("a", 1), record("a", 3), record("b", 2)]
    assert revisions(items) == [
        Revision("a", 3, "t3", "y", "m"),
        Revision("b", 2, "t2", "y", "m"),
    ]


KNOWN = revisions([record("c", 3), record("b", 2), record("a", 1)])


def fleet(**revision: str) -> dict[str, Any]:
    return {"status": {"revision": revision}}


def test_a_halted_rollout_goes_back_to_what_serves() -> None:
    assert undo_target(fleet(spec="c", target="c", serving="a"), KNOWN, None) == "a"


def test_a_finished_rollout_goes_back_to_the_one_before() -> None:
    assert undo_target(fleet(spec="c", target="c", serving="c"), KNOWN, None) == "b"


def test_a_named_revision() -> None:
    assert undo_target(fleet(spec="c", target="b", serving="b"), KNOWN, "a") == "a"


@pytest.mark.parametrize(
    ("body", "known", "wanted", "sentence"),
    [
        ({}, KNOWN, None, "nothing to undo"),
        (fleet(spec="c", target="c"), KNOWN, "z", "z is not recorded; there are: c, b, a"),
        (fleet(spec="c", target="b"), KNOWN, None, "c is undone already"),
        (fleet(spec="c", target="c", serving="c"), KNOWN[:1], None, "c is the only one"),
    ],
)
def test_what_cannot_be_undone(
    body: dict[str, Any], known: list[Revision], wanted: str | None, sentence: str
) -> None:
    with pytest.raises(CommandFailed, match=sentence):
        undo_target(body, known, wanted)


def condition(type_: str, status: str) -> dict[str, str]:
    return {"type": type_, "status": status, "message": f"{type_} is {status}"}


@pytest.mark.parametrize(
    ("observed", "conditions", "done", "stuck", "sentence"),
    [
        (1, [condition("Ready", "True")], False, False, "waiting for the operator"),
        (2, [condition("Ready", "True")], True, False, "Ready is True"),
        (2, [condition("Ready", "False")], False, False, "Ready is False"),
        (
            2,
            [condition("Ready", "False"), condition("Stalled", "True")],
            False,
            True,
            "Stalled is True",
        ),
        (2, [], False, False, "starting"),
    ],
)
def test_progress(
    observed: int, conditions: list[dict[str, str]], done: bool, stuck: bool, sentence: str
) -> None:
    body = {
        "metadata": {"generation": 2},
        "status": {"observedGeneration": observed, "conditions": conditions},
    }
    now = progress(body)
    assert (now.done, now.stuck) == (done, stuck)
    assert sentence in now.sentence


UNDO = {"tandem.dev/rollback": '{"from": "b", "to": "a"}'}
RESTART = {"tandem.dev/restartedAt": "t2"}


@pytest.mark.parametrize(
    ("annotations", "revision", "conditions", "seen"),
    [
        (RESTART, {"spec": "a", "target": "a", "restartedAt": "t1"}, {}, False),
        (RESTART, {"spec": "a", "target": "a"}, {}, False),
        (RESTART, {"spec": "b", "target": "b", "restartedAt": "t2"}, {}, True),
        (UNDO, {"spec": "b", "target": "b"}, {"Stalled": "True"}, False),
        (UNDO, {"spec": "b", "target": "a"}, {"RolledBack": "True"}, True),
        (UNDO, {"spec": "b", "target": "b"}, {"RolledBack": "False"}, True),
        (UNDO, {"spec": "c", "target": "c"}, {}, True),
        ({"tandem.dev/rollback": "oops"}, {"spec": "b", "target": "b"}, {}, True),
        ({}, {"spec": "a", "target": "a", "restartedAt": "t1"}, {}, False),
    ],
    ids=[
        "another restart",
        "the first restart",
        "restarted",
        "undo of a halted rollout",
        "undone",
        "undo to what is gone",
        "undo that the spec ended",
        "unreadable undo",
        "restart taken back",
    ],
)
def test_an_annotation_is_seen_before_its_rollout_is_judged(
    annotations: dict[str, str], revision: dict[str, str], conditions: dict[str, str], seen: bool
) -> None:
    """`restart && status` must not say of the old pods that they are the new ones."""
    found = [condition("Ready", "True"), *(condition(t, s) for t, s in conditions.items())]
    body = {
        "metadata": {"generation": 2, "annotations": annotations},
        "status": {"observedGeneration": 2, "conditions": found, "revision": revision},
    }
    assert (progress(body).sentence != "waiting for the operator to see the change") is seen


def test_an_edit_that_the_operator_has_not_seen_cannot_be_undone() -> None:
    body = {"metadata": {"generation": 3}, **fleet(spec="c", target="c", serving="b")}
    body["status"]["observedGeneration"] = 2
    with pytest.raises(CommandFailed, match="try again in a moment"):
        undo_target(body, KNOWN, None)


def test_a_restart_does_not_roll_out_what_was_undone() -> None:
    body = {"metadata": {"name": "chat", "annotations": UNDO}, **fleet(spec="b", target="a")}
    with pytest.raises(CommandFailed, match="b is undone and a is served"):
        refuse_restart(body)
    refuse_restart({"metadata": {"name": "chat"}, **fleet(spec="b", target="b")})
    refuse_restart({"metadata": {"name": "chat"}})
