"""Probes: when a result counts (pure), with a kubelet's thresholds and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ProbeKind(StrEnum):
    """What a probe decides."""

    STARTUP = "startup"
    READINESS = "readiness"
    LIVENESS = "liveness"

    @property
    def noun(self) -> str:
        """How Events call it."""
        return self.value.capitalize()


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe of a container's spec, defaults filled in."""

    kind: ProbeKind
    action: Mapping[str, Any]
    """The spec's own object: has one of httpGet, tcpSocket, exec, grpc."""
    initial_delay_s: float
    period_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int
    grace_s: float | None
    """terminationGracePeriodSeconds of the probe, over the pod's own."""

    @classmethod
    def from_spec(cls, kind: ProbeKind, spec: Mapping[str, Any]) -> Probe:
        """From a container's startupProbe, readinessProbe or livenessProbe."""
        return cls(
            kind,
            spec,
            spec.get("initialDelaySeconds") or 0,
            spec.get("periodSeconds") or 10,
            spec.get("timeoutSeconds") or 1,
            spec.get("successThreshold") or 1,
            spec.get("failureThreshold") or 3,
            spec.get("terminationGracePeriodSeconds"),
        )


def probes(container: Mapping[str, Any]) -> dict[ProbeKind, Probe]:
    """The probes that a container's spec has."""
    return {
        kind: Probe.from_spec(kind, spec)
        for kind in ProbeKind
        if (spec := container.get(f"{kind}Probe"))
    }


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What a probe has established, and the results in a row that may change it."""

    verdict: bool | None
    """None until a threshold was reached once (startup); False to begin with (readiness), True
    to begin with (liveness)."""
    last: bool | None = None
    streak: int = 0

    @classmethod
    def initial(cls, kind: ProbeKind) -> ProbeState:
        """Before the first result."""
        begin = {ProbeKind.READINESS: False, ProbeKind.LIVENESS: True, ProbeKind.STARTUP: None}
        return cls(begin[kind])


def observe(probe: Probe, state: ProbeState, success: bool) -> ProbeState:
    """The state after one more result."""
    streak = state.streak + 1 if state.last == success else 1
    needed = probe.success_threshold if success else probe.failure_threshold
    verdict = success if streak >= needed else state.verdict
    return ProbeState(verdict, success, streak)
