from __future__ import annotations

import dataclasses
from typing import Any

from tandem.agent.lifecycle import Container, Exit, Kind, Outcome, Policy, Run, Waiting
from tandem.agent.status import PodState, pod_status, rejection

NOW_S = 1_700_000_000.0
THEN_S = NOW_S - 60
NOW, THEN = "2023-11-14T22:13:20Z", "2023-11-14T22:12:20Z"
STATE = PodState("127.65.1.1", "127.65.1.2", THEN_S, Outcome.GOING)
MAIN = Container("c", Kind.MAIN, Policy.ALWAYS)
RUNNING = dataclasses.replace(MAIN, latest=Run(0, "id/0", 0, THEN_S), started=True)
READY = dataclasses.replace(RUNNING, ready=True)


def pod(**spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "ns", "uid": "u", "generation": 3},
        "spec": {"containers": [{"name": "c", "image": "i"}], **spec},
    }


def ended(code: int, *, number: int = 0, strikes: int = 0, message: str = "") -> Container:
    reason = "Error" if code else "Completed"
    run = Run(number, f"id/{number}", strikes, THEN_S, Exit(code, 0, NOW_S, reason, message))
    return dataclasses.replace(MAIN, latest=run)


def status(
    *containers: Container,
    state: PodState = STATE,
    of: dict[str, Any] | None = None,
    old: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    return pod_status(of or pod(), state, containers, old or [], NOW_S)


def condition(result: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(c for c in result["conditions"] if c["type"] == kind)


def conditions(result: dict[str, Any]) -> dict[str, str]:
    return {c["type"]: c["status"] for c in result["conditions"]}


def test_before_anything_runs() -> None:
    result = status(MAIN, state=dataclasses.replace(STATE, pod_ip=None))
    assert result["phase"] == "Pending"
    assert "podIP" not in result
    assert result["containerStatuses"][0]["state"] == {"waiting": {"reason": "ContainerCreating"}}
    assert conditions(result) == {
        "PodReadyToStartContainers": "False",
        "Initialized": "True",
        "Ready": "False",
        "ContainersReady": "False",
    }


def test_a_ready_pod() -> None:
    result = status(READY)
    assert result["phase"] == "Running"
    assert set(conditions(result).values()) == {"True"}
    assert result["observedGeneration"] == 3
    assert all(c["observedGeneration"] == 3 for c in result["conditions"])
    assert (result["podIP"], result["hostIP"]) == ("127.65.1.2", "127.65.1.1")
    assert result["startTime"] == THEN
    entry = result["containerStatuses"][0]
    assert entry["state"] == {"running": {"startedAt": THEN}}
    assert (entry["ready"], entry["started"], entry["restartCount"]) == (True, True, 0)
    assert (entry["containerID"], entry["imageID"]) == ("id/0", "tandem://i")


def test_an_unready_container_is_named() -> None:
    result = status(RUNNING)
    assert result["phase"] == "Running"
    assert condition(result, "Ready")["message"] == "containers with unready status: [c]"
    assert condition(result, "Ready")["reason"] == "ContainersNotReady"


def test_transition_times_are_kept_while_the_status_is() -> None:
    old = [
        {"type": "Ready", "status": "True", "lastTransitionTime": THEN},
        {"type": "Initialized", "status": "False", "lastTransitionTime": THEN},
    ]
    result = status(READY, old=old)
    assert condition(result, "Ready")["lastTransitionTime"] == THEN
    assert condition(result, "Initialized")["lastTransitionTime"] == NOW


def test_crash_loop_back_off() -> None:
    result = status(ended(1, number=3, strikes=2, message="boom"))
    entry = result["containerStatuses"][0]
    waiting = entry["state"]["waiting"]
    assert waiting["reason"] == "CrashLoopBackOff"
    assert waiting["message"] == "back-off 20s restarting failed container=c pod=p_ns(u)"
    assert entry["restartCount"] == 3
    assert entry["lastState"]["terminated"]["exitCode"] == 1
    assert entry["lastState"]["terminated"]["message"] == "boom"
    assert result["phase"] == "Running"


def test_a_restarted_container_remembers_its_last_run() -> None:
    previous = ended(137).latest
    again = dataclasses.replace(RUNNING, latest=Run(1, "id/1", 1, NOW_S), previous=previous)
    entry = status(again)["containerStatuses"][0]
    assert entry["state"] == {"running": {"startedAt": NOW}}
    assert entry["lastState"]["terminated"]["exitCode"] == 137
    assert entry["lastState"]["terminated"]["containerID"] == "id/0"


def test_a_container_that_could_not_start_says_why() -> None:
    waiting = Waiting("ErrImagePull", "no such image", NOW_S)
    entry = status(dataclasses.replace(MAIN, waiting=waiting))["containerStatuses"][0]
    assert entry["state"] == {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}


def test_a_start_error_is_in_the_sentence() -> None:
    end = Exit(128, 0, NOW_S, "StartError", 'exec: "x": not found')
    container = dataclasses.replace(MAIN, latest=Run(1, "id/1", 1, THEN_S, end))
    waiting = status(container)["containerStatuses"][0]["state"]["waiting"]
    assert waiting["message"].endswith('pod=p_ns(u): exec: "x": not found')


def test_init_containers() -> None:
    of = pod(initContainers=[{"name": "i", "image": "j"}])
    init = Container("i", Kind.INIT, Policy.ALWAYS)
    result = status(init, MAIN, of=of)
    assert condition(result, "Initialized")["status"] == "False"
    assert condition(result, "Initialized")["message"] == "containers with incomplete status: [i]"
    assert result["containerStatuses"][0]["state"] == {"waiting": {"reason": "PodInitializing"}}
    done = dataclasses.replace(init, latest=ended(0).latest)
    result = status(done, READY, of=of)
    assert conditions(result)["Initialized"] == "True"
    entry = result["initContainerStatuses"][0]
    assert entry["ready"] is True
    assert entry["state"]["terminated"]["reason"] == "Completed"


def test_a_sidecar_counts_for_readiness() -> None:
    of = pod(initContainers=[{"name": "s", "image": "j", "restartPolicy": "Always"}])
    sidecar = Container("s", Kind.SIDECAR, Policy.ALWAYS)
    assert conditions(status(sidecar, MAIN, of=of))["Initialized"] == "False"
    up = dataclasses.replace(sidecar, latest=Run(0, "s/0", 0, THEN_S), started=True)
    result = status(up, READY, of=of)
    assert conditions(result)["Initialized"] == "True"
    assert condition(result, "Ready")["message"] == "containers with unready status: [s]"


def test_readiness_gates() -> None:
    of = pod(readinessGates=[{"conditionType": "example.com/gate"}])
    result = status(READY, of=of)
    assert conditions(result)["ContainersReady"] == "True"
    assert condition(result, "Ready")["reason"] == "ReadinessGatesNotReady"
    of["status"] = {"conditions": [{"type": "example.com/gate", "status": "True"}]}
    assert conditions(status(READY, of=of))["Ready"] == "True"


def test_a_finished_pod() -> None:
    over = dataclasses.replace(STATE, outcome=Outcome.SUCCEEDED)
    never = dataclasses.replace(ended(0), policy=Policy.NEVER)
    result = status(never, state=over)
    assert result["phase"] == "Succeeded"
    assert condition(result, "Ready")["reason"] == "PodCompleted"
    assert condition(result, "ContainersReady")["status"] == "False"
    assert result["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 0


def test_a_failed_pod_with_its_reason() -> None:
    failed = dataclasses.replace(
        STATE, outcome=Outcome.FAILED, reason="DeadlineExceeded", message="too long"
    )
    result = status(ended(137), state=failed)
    assert (result["phase"], result["reason"]) == ("Failed", "DeadlineExceeded")
    assert "terminated" in result["containerStatuses"][0]["state"]


def test_a_deleted_pod_ends_in_a_terminal_phase() -> None:
    over = dataclasses.replace(STATE, outcome=Outcome.ENDED)
    assert status(ended(0), state=over)["phase"] == "Succeeded"
    result = status(ended(143), state=over)
    assert result["phase"] == "Failed"
    assert result["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 143


def test_rejection() -> None:
    result = rejection("OutOfcpu", "no room", NOW_S)
    assert (result["phase"], result["reason"]) == ("Failed", "OutOfcpu")
    assert result["message"] == "Pod was rejected: no room"
