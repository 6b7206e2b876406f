"""Ready, Reconciling and Stalled: one verdict on a fleet; the first thing that is wrong is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_operator.names import Reason
from tandem_operator.plan.pods import Pods
from tandem_operator.plan.pool_status import PoolHealth
from tandem_operator.plan.pools import Pools
from tandem_operator.plan.served_names import Names
from tandem_operator.plan.target import Target
from tandem_operator.plan.views import FleetSnapshot, FleetView


@dataclass(frozen=True)
class Verdict:
    """How a fleet is, in one condition, and whether it moves or is stuck."""

    ready: bool
    reason: str
    sentence: str
    moving: bool = False
    stuck: bool = False


def judge(
    snapshot: FleetSnapshot,
    fleet: FleetView,
    target: Target,
    pools: Pools,
    pods: Pods,
    healths: Sequence[PoolHealth],
    names: Names,
) -> Verdict:
    """The verdict on a fleet that exists."""
    if pools.foreign:
        return Verdict(False, Reason.POOL_FOREIGN, pools.foreign, moving=True)
    if target.blocked:
        return Verdict(False, target.blocked.reason, target.blocked.message, stuck=True)
    if target.revision is None:
        return _nothing_yet(target)
    moving = _rollout(snapshot, target, pools, pods, healths)
    if moving:
        return moving
    for health in healths:
        if health.below_floor:
            told = f": {health.worry}" if health.worry else ""
            sentence = f"{health.name} has {health.text} pods Ready{told}"
            return Verdict(False, Reason.PODS_NOT_READY, sentence)
    if names.taken and not names.granted:
        return Verdict(False, Reason.NAME_CONFLICT, conflict(fleet, names), stuck=True)
    if snapshot.gateway is None or snapshot.gateway.available_replicas == 0:
        worry = snapshot.gateway.worry if snapshot.gateway else None
        sentence = "no gateway pod is available yet" + (f": {worry}" if worry else "")
        return Verdict(False, Reason.GATEWAY_NOT_READY, sentence)
    if any(health.size == 0 for health in healths):
        idle = ", ".join(h.name for h in healths if h.size == 0)
        return Verdict(True, Reason.SCALED_TO_ZERO, f"scaled to zero on purpose: {idle}")
    return Verdict(True, Reason.SERVING, f"revision {target.revision} serves")


def _nothing_yet(target: Target) -> Verdict:
    """The verdict before the first revision: what the fleet waits for."""
    waiting = next((j for j in target.judgements if j.status is not True), None)
    if waiting is None:
        return Verdict(False, Reason.PODS_STARTING, "starting", moving=True)
    stuck = waiting.status is False
    return Verdict(False, waiting.reason, waiting.message, not stuck, stuck)


def _rollout(
    snapshot: FleetSnapshot,
    target: Target,
    pools: Pools,
    pods: Pods,
    healths: Sequence[PoolHealth],
) -> Verdict | None:
    """The verdict while pods are replaced or made for the first time; None once that is over."""
    serving = next((s.serving for s in pods.states.values() if s.role != "prefill"), None)
    first = serving is None
    asleep = all(h.size == 0 for h in healths) and not any(s.members for s in pods.states.values())
    moving = not asleep and (pods.step.rolling or first)
    if not (moving or target.checks or not pools.ready):
        return None
    counts = ", ".join(f"{h.name} {h.text}" for h in healths) or "no pods yet"
    blame = _blame(snapshot, target)
    if blame:
        kept = f"revision {serving} serves on" if serving else "nothing serves yet"
        sentence = f"revision {target.revision} is halted, {kept}: {blame}"
        return Verdict(False, Reason.ROLLOUT_HALTED, sentence, stuck=True)
    starved = next((p for p in snapshot.pods if p.starved and not p.terminating), None)
    if starved:
        sentence = f"pod {starved.name} waits for resources: {starved.unschedulable}"
        late_s = _deadline_s(snapshot)
        stuck = snapshot.now_s - starved.created_s >= late_s
        return Verdict(False, Reason.INSUFFICIENT_CAPACITY, sentence, not stuck, stuck)
    if snapshot.refused:
        sentence = f"a pod cannot be made: {snapshot.refused}"
        return Verdict(False, Reason.WRITE_REFUSED, sentence, moving=True)
    if first:
        return Verdict(False, Reason.PODS_STARTING, f"starting: {counts}", moving=True)
    to = target.spec_revision if target.checks else target.revision
    sentence = f"moving from revision {serving} to {to}: {counts}"
    return Verdict(False, Reason.ROLLING_OUT, sentence, moving=True)


def _deadline_s(snapshot: FleetSnapshot) -> int:
    """The fleet's progress deadline."""
    return snapshot.fleet.spec.rollout.progress_deadline_seconds if snapshot.fleet else 0


def _blame(snapshot: FleetSnapshot, target: Target) -> str | None:
    """What a broken pod of the target says of itself."""
    for pod in sorted(snapshot.pods, key=lambda p: p.name):
        if pod.revision != target.revision or pod.ready or pod.terminating:
            continue
        if pod.problem:
            return f"pod {pod.name}: {pod.problem.reason}: {pod.problem.sentence}"
        late = snapshot.now_s - pod.waiting_since_s >= _deadline_s(snapshot)
        if late and not pod.starved:
            told = pod.unschedulable or "no container reported why"
            return (
                f"pod {pod.name} is not Ready after {_deadline_s(snapshot)} s "
                f"(rollout.progressDeadlineSeconds): {told}"
            )
    return None


def conflict(fleet: FleetView, names: Names) -> str:
    """Who serves the names that this fleet wants too."""
    taken = ", ".join(f"{name} (InferenceFleet {holder})" for name, holder in names.taken.items())
    return (
        f"an older fleet already serves {taken}; give Model {fleet.spec.model_ref.name} other "
        "servedNames, or delete one of the fleets"
    )
