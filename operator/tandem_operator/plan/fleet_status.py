"""A fleet's status: conditions in kstatus' sense, counts, names, latency.

Ready is true only when the pods of the revision that the spec asks for serve. A change of size
alone changes neither Ready nor Reconciling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem_runtime.contract import ANNOTATION_RESTARTED_AT

from tandem_operator.api.fleet import (
    FleetRevision,
    FleetStatus,
    Latency,
    Objective,
    Percentiles,
    PoolCount,
)
from tandem_operator.api.meta import Judgement, set_conditions
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.actions import Notify, WriteStatus
from tandem_operator.plan.pool_status import PoolHealth
from tandem_operator.plan.scaling_status import scaling_judgement
from tandem_operator.plan.served_names import Names
from tandem_operator.plan.target import Target
from tandem_operator.plan.times import to_text
from tandem_operator.plan.verdict import Verdict, conflict
from tandem_operator.plan.views import FleetSnapshot, FleetView


def judgements(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    target: Target,
    healths: Sequence[PoolHealth],
    names: Names,
    verdict: Verdict,
) -> list[Judgement]:
    """All conditions of a fleet."""
    found = [
        Judgement(Condition.READY, verdict.ready, verdict.reason, verdict.sentence),
        *target.judgements,
        *(_availability(health) for health in healths),
        _gateway(snapshot),
        _names(fleet, names),
    ]
    if verdict.moving:
        found.append(Judgement(Condition.RECONCILING, True, verdict.reason, verdict.sentence))
    if verdict.stuck:
        found.append(Judgement(Condition.STALLED, True, verdict.reason, verdict.sentence))
    found += scaling_judgement(fleet, snapshot.pools, snapshot.scaled)
    if fleet.spec.objectives:
        found.append(_objectives(fleet, snapshot.latency))
    return found


def _availability(health: PoolHealth) -> Judgement:
    prefill = health.role == "prefill"
    type_ = Condition.PREFILL_AVAILABLE if prefill else Condition.DECODE_AVAILABLE
    sentence = f"{health.text} pods are Ready"
    if health.size == 0:
        return Judgement(type_, False, Reason.SCALED_TO_ZERO, sentence)
    if health.ready < health.size and health.worry:
        sentence = f"{sentence}: {health.worry}"
    if health.ready == 0:
        return Judgement(type_, False, Reason.PODS_NOT_READY, sentence)
    return Judgement(type_, True, Reason.PODS_READY, sentence)


def _gateway(snapshot: FleetSnapshot) -> Judgement:
    available = snapshot.gateway.available_replicas if snapshot.gateway else 0
    if not available:
        worry = snapshot.gateway.worry if snapshot.gateway else None
        told = f": {worry}" if worry else ""
        sentence = f"no pod of Deployment tandem-gateway is available{told}"
        return Judgement(Condition.GATEWAY_AVAILABLE, False, Reason.GATEWAY_NOT_READY, sentence)
    sentence = "Deployment tandem-gateway is available"
    return Judgement(Condition.GATEWAY_AVAILABLE, True, Reason.GATEWAY_READY, sentence)


def _names(fleet: FleetView, names: Names) -> Judgement:
    if names.taken:
        sentence = conflict(fleet, names)
        return Judgement(Condition.NAMES_SERVED, False, Reason.NAME_CONFLICT, sentence)
    if not names.granted:
        sentence = "which names it serves is known once its Model exists"
        return Judgement(Condition.NAMES_SERVED, None, Reason.MODEL_NOT_FOUND, sentence)
    sentence = f"serves {', '.join(names.granted)}"
    return Judgement(Condition.NAMES_SERVED, True, Reason.NAMES_UNIQUE, sentence)


def _objectives(fleet: FleetView, latency: Latency | None) -> Judgement:
    """Whether the last minute kept the objectives."""
    if latency is None or fleet.spec.objectives is None:
        return Judgement(
            Condition.SLO_MET, None, Reason.NO_MEASUREMENT, "no requests were measured lately"
        )
    missed, unmeasured = [], []
    for label, objective, measured in (
        ("TTFT", fleet.spec.objectives.time_to_first_token, latency.time_to_first_token),
        ("TPOT", fleet.spec.objectives.time_per_output_token, latency.time_per_output_token),
    ):
        if objective is None:
            continue
        if measured is None:
            unmeasured.append(label)
        elif _microseconds(objective, measured) > 1000 * objective.target_milliseconds:
            missed.append(f"{label} p{objective.percentile} is over {_target(objective)}")
    if missed:
        return Judgement(Condition.SLO_MET, False, Reason.OBJECTIVES_MISSED, "; ".join(missed))
    if unmeasured:
        sentence = f"no {', '.join(unmeasured)} was measured lately"
        return Judgement(Condition.SLO_MET, None, Reason.NO_MEASUREMENT, sentence)
    return Judgement(Condition.SLO_MET, True, Reason.OBJECTIVES_MET, "all objectives are kept")


def _target(objective: Objective) -> str:
    return f"its target of {objective.target_milliseconds} ms"


def _microseconds(objective: Objective, measured: Percentiles) -> int:
    p50 = objective.percentile == 50
    return measured.p50_microseconds if p50 else measured.p95_microseconds


def fleet_status(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    target: Target,
    states: Mapping[str, str | None],
    healths: Sequence[PoolHealth],
    names: Names,
    found: Sequence[Judgement],
) -> FleetStatus:
    """The whole status. `states` has each role's serving revision after this plan."""
    counts = {
        "prefill" if h.role == "prefill" else "decode": PoolCount(
            replicas=h.size, ready_replicas=h.ready, ready=h.text
        )
        for h in healths
    }
    serving = next((s for role, s in states.items() if role != "prefill"), None)
    revision = (
        FleetRevision(
            target=target.revision,
            serving=serving,
            spec=target.spec_revision,
            restarted_at=fleet.annotations.get(ANNOTATION_RESTARTED_AT),
        )
        if target.revision
        else None
    )
    latency = snapshot.latency
    return FleetStatus(
        observed_generation=fleet.generation,
        conditions=set_conditions(
            fleet.status.conditions, found, fleet.generation, to_text(snapshot.now_s)
        ),
        url=snapshot.gateway.url if snapshot.gateway else None,
        served_names=names.granted,
        revision=revision,
        prefill=counts.get("prefill"),
        decode=counts.get("decode"),
        latency=latency,
        ttft=_duration(latency.time_to_first_token) if latency else None,
        tpot=_duration(latency.time_per_output_token) if latency else None,
    )


def _duration(measured: Percentiles | None) -> str | None:
    """The 95th percentile in two digits for people: 8.5ms, 120ms, 1.5s."""
    if measured is None:
        return None
    microseconds = measured.p95_microseconds
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.3g}ms"
    return f"{microseconds / 1_000_000:.3g}s"


def status_write(fleet: FleetView, status: FleetStatus) -> tuple[WriteStatus, ...]:
    """The write, where the status differs from the live one."""
    if status == fleet.status:
        return ()
    return (WriteStatus(fleet.ref, status.model_dump(by_alias=True, exclude_none=True)),)


_TOLD = (
    Condition.READY,
    Condition.STALLED,
    Condition.MODEL_RESOLVED,
    Condition.NAMES_SERVED,
    Condition.ROLLED_BACK,
    Condition.SCALING_ACTIVE,
)
_NORMAL = (
    Reason.PODS_STARTING,
    Reason.ROLLING_OUT,
    Reason.RESOLVING,
    Reason.MODEL_NOT_RESOLVED,
    Reason.TEMPLATE_NOT_CHECKED,
    Reason.SHADOW,
)


def transitions(fleet: FleetView, status: FleetStatus) -> tuple[Notify, ...]:
    """Events for the conditions that change; none once the status is written."""
    before = {c.type: (c.status, c.reason) for c in fleet.status.conditions}
    stalled = any(c.type == Condition.STALLED for c in status.conditions)
    events = []
    for condition in status.conditions:
        changed = before.get(condition.type) != (condition.status, condition.reason)
        if not changed or condition.type not in _TOLD or condition.status == "Unknown":
            continue
        good = condition.status == "True" and condition.type != Condition.STALLED
        if good and condition.type in (Condition.MODEL_RESOLVED, Condition.NAMES_SERVED):
            continue
        if condition.type == Condition.READY and not good and stalled:
            continue  # Stalled says the same.
        if good or condition.reason in _NORMAL:
            events.append(Notify(fleet.ref, "Normal", condition.reason, condition.message))
        else:
            events.append(Notify(fleet.ref, "Warning", condition.reason, condition.message))
    return tuple(events)
