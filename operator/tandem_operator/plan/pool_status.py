"""A Pool's status: counts, the revision that serves, and how much of its size was reached."""

from __future__ import annotations

from dataclasses import dataclass

from tandem_operator.api.meta import Judgement, set_conditions
from tandem_operator.api.pool import PoolScaling, PoolStatus
from tandem_operator.names import Condition, Reason
from tandem_operator.plan.actions import WriteStatus
from tandem_operator.plan.build import pool_selector, selector_text
from tandem_operator.plan.replicas import Size
from tandem_operator.plan.rollout import PoolState
from tandem_operator.plan.times import to_text
from tandem_operator.plan.views import FleetSnapshot, PoolView


@dataclass(frozen=True)
class PoolHealth:
    """How a pool serves now."""

    name: str
    role: str
    size: int
    ready: int
    """Ready pods of any revision."""
    floor: int
    """Fewer Ready pods than this is a fault and not a pool that still grows."""
    established: int
    worry: str | None
    """The sentence of a pod that is not Ready, if one has something to say."""

    @property
    def text(self) -> str:
        return f"{self.ready}/{self.size}"

    @property
    def below_floor(self) -> bool:
        return self.ready < self.floor


def health(pool: PoolView, state: PoolState, worry: str | None) -> PoolHealth:
    """Judge a pool.

    Growing is no fault: the floor counts only what has been Ready since the size last changed.
    """
    ready = sum(m.ready for m in state.members)
    established = min(state.size, max(pool.status.established_replicas or 0, ready))
    floor = max(min(established, state.size) - state.max_unavailable, min(1, state.size))
    return PoolHealth(pool.name, state.role, state.size, ready, floor, established, worry)


def worry(snapshot: FleetSnapshot, pool: PoolView) -> str | None:
    """The first sentence of a pod that is not Ready, by name, so that it stays the same one."""
    for pod in sorted(snapshot.pods, key=lambda p: p.name):
        if pod.pool_uid != pool.uid or pod.ready or pod.terminating:
            continue
        if pod.problem:
            return f"pod {pod.name}: {pod.problem.sentence}"
        if pod.unschedulable:
            return f"pod {pod.name}: {pod.unschedulable}"
    return snapshot.refused


def _decided(pool: PoolView, size: Size) -> int | None:
    """What to remember of the decision: a size only once the Pool has it, or a write that failed
    would look like somebody else's."""
    if size.owner is None:
        return None
    return pool.status.decided_replicas if size.write else size.replicas


def pool_status(
    pool: PoolView,
    state: PoolState,
    size: Size,
    judged: PoolHealth,
    rolled_out: bool,
    scaling: PoolScaling | None,
    now_s: float,
) -> tuple[WriteStatus, ...]:
    """The write of a pool's status, where it differs."""
    if judged.size == 0:
        ready = Judgement(Condition.READY, True, Reason.SCALED_TO_ZERO, "scaled to zero")
    elif judged.below_floor:
        told = f": {judged.worry}" if judged.worry else ""
        sentence = f"{judged.text} pods are Ready, {judged.floor} are needed{told}"
        ready = Judgement(Condition.READY, False, Reason.PODS_NOT_READY, sentence)
    else:
        ready = Judgement(Condition.READY, True, Reason.PODS_READY, f"{judged.text} pods are Ready")
    status = PoolStatus(
        observed_generation=pool.generation,
        conditions=set_conditions(pool.status.conditions, [ready], pool.generation, to_text(now_s)),
        replicas=len(state.members),
        ready_replicas=judged.ready,
        updated_replicas=sum(m.revision == state.target for m in state.members),
        selector=selector_text(pool_selector(pool.spec.fleet_ref.name, pool.name)),
        current_revision=state.target if rolled_out else pool.status.current_revision,
        decided_replicas=_decided(pool, size),
        scaling=scaling,
        established_replicas=judged.established,
    )
    if status == pool.status:
        return ()
    return (WriteStatus(pool.ref, status.model_dump(by_alias=True, exclude_none=True)),)
