"""What is wrong with a pod, in its own words."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_operator.plan.health import Problem, pod_problem


def container(**fields: Any) -> dict[str, Any]:
    return {"status": {"containerStatuses": [{"name": "runtime", "ready": False, **fields}]}}


@pytest.mark.parametrize(
    ("pod", "problem"),
    [
        ({}, None),
        (container(state={"running": {}}), None),
        (container(state={"waiting": {"reason": "ContainerCreating"}}), None),
        (
            container(state={"waiting": {"reason": "ErrImagePull", "message": "no such image"}}),
            Problem("ErrImagePull", "no such image"),
        ),
        (
            container(
                restartCount=2,
                state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}},
                lastState={"terminated": {"exitCode": 64, "message": "weights are missing\n"}},
            ),
            Problem("BadConfig", "weights are missing"),
        ),
        (
            container(restartCount=1, lastState={"terminated": {"exitCode": 137, "signal": 9}}),
            Problem("CrashLoop", "container runtime ended with signal 9, restarted 1 times"),
        ),
        (
            container(restartCount=0, state={"terminated": {"exitCode": 1, "reason": "OOMKilled"}}),
            Problem(
                "CrashLoop", "container runtime ended with exit 1 (OOMKilled), restarted 0 times"
            ),
        ),
        (
            {"status": {"phase": "Failed", "reason": "OutOfnvidia.com/gpu", "message": "no"}},
            Problem("OutOfnvidia.com/gpu", "no"),
        ),
        (
            {
                "status": {
                    "initContainerStatuses": [
                        {"name": "fetch", "state": {"waiting": {"reason": "InvalidImageName"}}}
                    ]
                }
            },
            Problem("InvalidImageName", "container fetch cannot start"),
        ),
    ],
    ids=[
        "no status",
        "starting",
        "creating",
        "image",
        "bad config",
        "killed",
        "ended",
        "failed",
        "init",
    ],
)
def test_pod_problem(pod: dict[str, Any], problem: Problem | None) -> None:
    assert pod_problem(pod) == problem
