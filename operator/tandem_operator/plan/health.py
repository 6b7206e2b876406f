"""What is wrong with a pod, in the pod's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_runtime.contract import EXIT_BAD_CONFIG

_CANNOT_START = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    }
)


@dataclass(frozen=True)
class Problem:
    """Why a pod does not serve. Waiting alone does not help, though it may heal."""

    reason: str
    sentence: str


def pod_problem(pod: Mapping[str, Any]) -> Problem | None:
    """The problem of a pod that is not Ready, or None while it may simply be starting."""
    status = pod.get("status") or {}
    if status.get("phase") == "Failed":
        return Problem(
            status.get("reason") or "Failed", status.get("message") or _exit_sentences(status)
        )
    statuses = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    for container in statuses:
        problem = _container_problem(container)
        if problem:
            return problem
    return None


def _container_problem(container: Mapping[str, Any]) -> Problem | None:
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    if waiting.get("reason") in _CANNOT_START:
        sentence = waiting.get("message") or f"container {container['name']} cannot start"
        return Problem(waiting["reason"], sentence)
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated")
    if not ended or container.get("ready"):
        return None
    if state.get("terminated") and ended.get("exitCode") == 0:
        return None
    reason = "BadConfig" if ended.get("exitCode") == EXIT_BAD_CONFIG else "CrashLoop"
    return Problem(reason, _exit_sentence(container, ended))


def _exit_sentence(container: Mapping[str, Any], ended: Mapping[str, Any]) -> str:
    """What the container left in its termination message, else how it ended."""
    message = str(ended.get("message") or "").strip()
    if message:
        return message
    restarts = container.get("restartCount", 0)
    how = f"signal {ended['signal']}" if ended.get("signal") else f"exit {ended.get('exitCode')}"
    detail = ended.get("reason")
    cause = f" ({detail})" if detail and detail not in ("Error", "Completed") else ""
    return f"container {container['name']} ended with {how}{cause}, restarted {restarts} times"


def _exit_sentences(status: Mapping[str, Any]) -> str:
    for container in status.get("containerStatuses", ()):
        ended = (container.get("state") or {}).get("terminated")
        if ended and ended.get("exitCode"):
            return _exit_sentence(container, ended)
    return "the pod failed without a message"
