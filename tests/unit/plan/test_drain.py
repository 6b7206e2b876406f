"""Emptying a pod: each step follows from what the pod says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem_operator.names import Reason
from tandem_operator.plan import drain
from tandem_operator.plan.actions import Action, Annotate, Delete, PostDrain
from tandem_operator.plan.health import Problem
from tandem_operator.plan.views import PodView
from tandem_runtime.protocol import DrainRequest, PodState

NOW_S = 1_700_000_000.0
POD = PodView(
    namespace="team",
    name="chat-decode-r-0",
    uid="u",
    fleet="chat",
    pool="chat-decode",
    pool_uid="pool",
    role="decode",
    revision="r",
    created_s=NOW_S - 1000,
    terminating=False,
    finished=False,
    ready=True,
    ip="127.0.0.1",
    unschedulable=None,
    problem=None,
    draining=None,
    draining_since_s=None,
    served_names="a",
)
LEAVING = replace(POD, draining="ScaleIn", draining_since_s=NOW_S - 10)


def state(
    *, draining: bool = True, running: int = 0, waiting: int = 0, exporting: int = 0
) -> PodState:
    return PodState("p", "", "", "", True, draining, running, waiting, exporting, 0.0, 0, 0.0)


def what(leaving: drain.Leaving) -> list[str]:
    """The actions, in words."""
    return [_word(action) for action in leaving.actions]


def _word(action: Action) -> str:
    match action:
        case Delete(_, reason):
            return f"delete {reason}"
        case PostDrain(_, _, request):
            return request.mode
        case Annotate(_, annotations):
            return "mark" if all(annotations.values()) else "unmark"
        case _:
            return type(action).__name__


def test_a_serving_pod_is_marked_and_then_told() -> None:
    leaving = drain.start(POD, Reason.SCALE_IN, NOW_S)
    assert what(leaving) == ["mark", "drain"]
    assert leaving.poll


@pytest.mark.parametrize("pod", [replace(POD, ready=False), replace(POD, ip=None)])
def test_a_pod_that_serves_nobody_goes_at_once(pod: PodView) -> None:
    assert what(drain.start(pod, Reason.SCALE_IN, NOW_S)) == ["delete ScaleIn"]


@pytest.mark.parametrize(
    ("pod", "said", "steps", "polls"),
    [
        (LEAVING, state(draining=False, running=1), ["drain"], True),
        (LEAVING, state(draining=False), ["drain"], True),
        (LEAVING, state(running=1), [], True),
        (LEAVING, state(waiting=1), [], True),
        (LEAVING, state(exporting=1), [], True),
        (LEAVING, state(), ["delete Drained"], False),
        (LEAVING, None, [], True),
        (replace(LEAVING, ready=False), state(), ["delete Drained"], False),
        (
            replace(LEAVING, ready=False, problem=Problem("CrashLoop", "x")),
            None,
            ["delete NotServing"],
            False,
        ),
        (
            replace(LEAVING, draining_since_s=NOW_S - 600),
            state(running=9),
            ["delete DrainTimedOut"],
            False,
        ),
        (replace(LEAVING, draining_since_s=NOW_S - 600), None, ["delete DrainTimedOut"], False),
    ],
    ids=[
        "not told yet",
        "not told yet, though empty",
        "streams",
        "queued streams",
        "exports",
        "empty",
        "silent",
        "empty and not ready",
        "crashed",
        "too late",
        "silent too long",
    ],
)
def test_proceed(pod: PodView, said: PodState | None, steps: list[str], polls: bool) -> None:
    leaving = drain.proceed(pod, said, 600, NOW_S)
    assert what(leaving) == steps
    assert leaving.poll is polls


def test_a_drain_is_cancelled_at_the_pod_first() -> None:
    assert what(drain.cancel(LEAVING)) == ["cancel", "unmark"]


def test_pods_of_a_deleted_pool_are_told_once() -> None:
    leaving = drain.end(POD, NOW_S)
    assert what(leaving) == ["end", "mark"]
    (post, mark) = leaving.actions
    assert isinstance(post, PostDrain)
    assert isinstance(mark, Annotate)
    assert post.request == DrainRequest("end", deadline_s=30.0)
    told = replace(POD, draining=mark.annotations["tandem.dev/draining"])
    assert what(drain.end(told, NOW_S)) == []
    assert what(drain.end(LEAVING, NOW_S)) == ["end", "mark"], "a drain became an end unsaid"


@pytest.mark.parametrize(
    ("pods", "size", "asked"),
    [
        ([POD], 1, 0),
        ([POD], 0, 1),
        ([POD, LEAVING], 1, 2),
        ([POD, replace(POD, revision="s")], 2, 2),
        ([POD, replace(POD, ready=False)], 1, 1),
        ([replace(LEAVING, terminating=True)], 1, 0),
        ([replace(LEAVING, finished=True)], 1, 0),
    ],
    ids=[
        "at rest",
        "one too many",
        "one leaves",
        "two revisions",
        "one not ready",
        "terminating",
        "finished",
    ],
)
def test_pods_are_asked_while_one_has_to_go(pods: list[PodView], size: int, asked: int) -> None:
    assert len(drain.pods_to_ask(pods, {"chat-decode": size})) == asked
