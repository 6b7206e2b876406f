"""A pod's status as a kubelet writes it: pure functions of what is known of its containers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tandem.agent.images import image_id
from tandem.agent.lifecycle import Container, Kind, Outcome, Run
from tandem.agent.node import timestamp, with_transitions

Object: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PodState:
    """What the agent knows of a pod, beside its containers."""

    node_ip: str
    pod_ip: str | None
    """None until the pod's folder and volumes are ready."""
    started_at_s: float
    outcome: Outcome
    reason: str | None = None
    """Why the pod as a whole failed (DeadlineExceeded, OutOfcpu, ...)."""
    message: str | None = None


def pod_status(
    pod: Mapping[str, Any],
    state: PodState,
    containers: Sequence[Container],
    old_conditions: Sequence[Object],
    now_s: float,
) -> Object:
    """The fields of status that belong to the node.

    Conditions of other owners (PodScheduled, DisruptionTarget) are not among them: the patch
    merges conditions by type. Transition times are kept from `old_conditions`.
    """
    specs = {c["name"]: c for c in _specs(pod)}
    entries = {c.name: _container_status(c, specs[c.name], state, pod) for c in containers}
    phase = _phase(state.outcome, containers, pod)
    conditions = with_transitions(
        [
            {**condition, "observedGeneration": pod["metadata"].get("generation")}
            for condition in _conditions(pod, state, containers, phase)
        ],
        old_conditions,
        now_s,
    )
    result: Object = {
        "observedGeneration": pod["metadata"].get("generation"),
        "phase": phase,
        "reason": state.reason,
        "message": state.message,
        "startTime": timestamp(state.started_at_s),
        "hostIP": state.node_ip,
        "hostIPs": [{"ip": state.node_ip}],
        "conditions": conditions,
        "containerStatuses": [entries[c["name"]] for c in pod["spec"]["containers"]],
    }
    if state.pod_ip:
        result["podIP"] = state.pod_ip
        result["podIPs"] = [{"ip": state.pod_ip}]
    if inits := pod["spec"].get("initContainers"):
        result["initContainerStatuses"] = [entries[c["name"]] for c in inits]
    return result


def rejection(reason: str, message: str, now_s: float) -> Object:
    """The status of a pod that this node refuses to run."""
    return {
        "phase": "Failed",
        "reason": reason,
        "message": f"Pod was rejected: {message}",
        "startTime": timestamp(now_s),
    }


def _specs(pod: Mapping[str, Any]) -> list[Object]:
    return [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]


def _phase(outcome: Outcome, containers: Sequence[Container], pod: Mapping[str, Any]) -> str:
    if outcome is Outcome.SUCCEEDED:
        return "Succeeded"
    if outcome is Outcome.FAILED:
        return "Failed"
    mains = [c for c in containers if c.kind is Kind.MAIN]
    if outcome is Outcome.ENDED:
        return _ended_phase(mains, pod)
    begun = all(c.latest is not None for c in mains)
    return "Running" if begun else "Pending"


def _ended_phase(mains: Sequence[Container], pod: Mapping[str, Any]) -> str:
    """A deleted pod's last phase: terminal once nothing of it runs, whatever its policy."""
    runs = [c.latest for c in mains]
    if all(run is not None and run.exit is not None and run.exit.code == 0 for run in runs):
        return "Succeeded"
    return "Failed"


def _conditions(
    pod: Mapping[str, Any], state: PodState, containers: Sequence[Container], phase: str
) -> list[Object]:
    over = phase in ("Succeeded", "Failed")
    inits = [c for c in containers if c.kind is Kind.INIT]
    sidecars = [c for c in containers if c.kind is Kind.SIDECAR]
    serving = [c for c in containers if c.kind is not Kind.INIT]
    unfinished = [c.name for c in inits if not c.succeeded]
    unfinished += [c.name for c in sidecars if not c.started]
    begun = any(c.kind is Kind.MAIN and c.latest is not None for c in containers)
    unready = [c.name for c in serving if not c.ready]
    completed = ("PodCompleted", None) if phase == "Succeeded" else ("PodFailed", None)
    initialized = _condition(
        "Initialized",
        begun or not unfinished,
        "ContainersNotInitialized",
        f"containers with incomplete status: [{' '.join(unfinished)}]",
    )
    if phase == "Succeeded":
        initialized["reason"] = "PodCompleted"
    reason, message = "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]"
    if over:
        reason, message = completed[0], ""
    containers_ready = _condition("ContainersReady", not unready and not over, reason, message)
    gates = _closed_gates(pod)
    ready = dict(containers_ready, type="Ready")
    if containers_ready["status"] == "True" and gates:
        text = "corresponding condition of pod readiness gate does not exist or is not True: "
        ready = _condition("Ready", False, "ReadinessGatesNotReady", text + ", ".join(gates))
    sandbox = _condition("PodReadyToStartContainers", state.pod_ip is not None and not over, "", "")
    return [sandbox, initialized, ready, containers_ready]


def _condition(kind: str, true: bool, reason: str, message: str) -> Object:
    # null takes a reason away that an earlier patch wrote.
    return {
        "type": kind,
        "status": "True" if true else "False",
        "reason": None if true else reason or None,
        "message": None if true else message or None,
    }


def _closed_gates(pod: Mapping[str, Any]) -> list[str]:
    conditions = (pod.get("status") or {}).get("conditions") or []
    true = {c["type"] for c in conditions if c["status"] == "True"}
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    return [gate for gate in gates if gate not in true]


def _container_status(
    container: Container,
    spec: Mapping[str, Any],
    state: PodState,
    pod: Mapping[str, Any],
) -> Object:
    latest, previous = container.latest, container.previous
    result: Object = {
        "name": container.name,
        "image": spec["image"],
        "imageID": image_id(spec["image"]) if latest is not None else "",
        "ready": container.succeeded if container.kind is Kind.INIT else container.ready,
        "started": container.started,
        "restartCount": 0 if latest is None else latest.number,
        "state": _state(container, state, pod),
        "lastState": {},
    }
    if latest is not None:
        result["containerID"] = latest.container_id
    shows_latest = "terminated" in result["state"]
    last = previous if container.running or shows_latest else latest
    if last is not None and last.exit is not None:
        result["lastState"] = {"terminated": _terminated(last)}
    return result


def _state(container: Container, state: PodState, pod: Mapping[str, Any]) -> Object:
    latest, waiting = container.latest, container.waiting
    if latest is not None and latest.exit is None:
        return {"running": {"startedAt": timestamp(latest.started_at_s)}}
    if state.outcome is not Outcome.GOING or (latest is not None and container.over):
        if latest is not None:
            return {"terminated": _terminated(latest)}
    elif waiting is not None:
        return {"waiting": {"reason": waiting.reason, "message": waiting.message}}
    elif latest is not None and latest.exit is not None:
        delay_s = latest.restart_at_s() - latest.exit.finished_at_s
        if delay_s <= 0:
            return {"terminated": _terminated(latest)}
        return {"waiting": _crash_loop(container, latest, delay_s, pod)}
    initialising = container.kind is Kind.MAIN and pod["spec"].get("initContainers")
    return {"waiting": {"reason": "PodInitializing" if initialising else "ContainerCreating"}}


def _crash_loop(
    container: Container, latest: Run, delay_s: float, pod: Mapping[str, Any]
) -> Object:
    metadata = pod["metadata"]
    assert latest.exit is not None
    start_error = latest.exit.reason == "StartError"
    who = f"{metadata['name']}_{metadata['namespace']}({metadata['uid']})"
    message = f"back-off {delay_s:g}s restarting failed container={container.name} pod={who}"
    if start_error:
        message += f": {latest.exit.message}"
    return {"reason": "CrashLoopBackOff", "message": message}


def _terminated(run: Run) -> Object:
    assert run.exit is not None
    result: Object = {
        "exitCode": run.exit.code,
        "reason": run.exit.reason,
        "startedAt": timestamp(run.started_at_s),
        "finishedAt": timestamp(run.exit.finished_at_s),
        "containerID": run.container_id,
    }
    if run.exit.signal:
        result["signal"] = run.exit.signal
    if run.exit.message:
        result["message"] = run.exit.message
    return result
