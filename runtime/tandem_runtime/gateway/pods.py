"""A runtime pod as the gateway sees it: a pure reading of the Kubernetes object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from tandem_runtime import contract
from tandem_runtime.contract import Role

MOST_SLOWER_PERCENT: Final = 400


@dataclass(frozen=True)
class PodView:
    uid: str
    name: str
    ip: str
    """Empty until it has one."""
    fleet: str
    role: Role
    revision: str
    served_names: tuple[str, ...]
    created_unix_s: float
    ready: bool
    """The Ready condition."""
    leaving: bool
    """Being deleted, or emptied by the operator: nothing new goes there."""
    slower_percent: int = 0
    """By how much it is slower than its peers, as the operator suspects."""
    http_port: int = contract.HTTP_PORT
    handoff_port: int = contract.HANDOFF_PORT

    @property
    def admits(self) -> bool:
        return self.ready and not self.leaving

    @property
    def decodes(self) -> bool:
        return self.role is not Role.PREFILL


def pod_view(pod: Mapping[str, Any]) -> PodView | None:
    """None for a pod that is none of a fleet's runtime pods, or has ended.

    One that is only coming counts: it tells the names that its fleet is about to serve.
    """
    metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
    labels = metadata.get("labels") or {}
    annotations = metadata.get("annotations") or {}
    role = labels.get(contract.LABEL_ROLE)
    ip = status.get("podIP") or ""
    if role not in set(Role) or status.get("phase") in ("Succeeded", "Failed"):
        return None
    names = annotations.get(contract.ANNOTATION_SERVED_NAMES, "")
    return PodView(
        uid=metadata.get("uid", ""),
        name=metadata.get("name", ""),
        ip=ip,
        fleet=labels.get(contract.LABEL_FLEET, ""),
        role=Role(role),
        revision=labels.get(contract.LABEL_REVISION, ""),
        served_names=tuple(name.strip() for name in names.split(",") if name.strip()),
        created_unix_s=_unix_s(metadata.get("creationTimestamp")),
        ready=ip != ""
        and any(
            condition.get("type") == "Ready" and condition.get("status") == "True"
            for condition in status.get("conditions") or []
        ),
        leaving="deletionTimestamp" in metadata or contract.ANNOTATION_DRAINING in annotations,
        slower_percent=_percent(annotations.get(contract.ANNOTATION_SLOWER_PERCENT, "")),
    )


def _percent(text: str) -> int:
    """0 for what is no number; no pod is shunned altogether."""
    return min(int(text), MOST_SLOWER_PERCENT) if text.isascii() and text.isdigit() else 0


def _unix_s(timestamp: str | None) -> float:
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else 0.0
