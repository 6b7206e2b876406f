"""What was decided for an autoscaled pool: the size to write, and what its status says of it.

Somebody else's write of an autoscaled pool is not fought: the policy reports it, stands back for
STAND_BACK_S after the last one, and then goes on from the size that it finds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tandem_operator.api.pool import PoolScaling, ScalingDecision, ScheduleInForce
from tandem_operator.names import Reason
from tandem_operator.plan.autoscale import Trouble
from tandem_operator.plan.scaling.decision import Decision, ScaleReason
from tandem_operator.plan.scaling.record import changed, state_of, state_text
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.times import to_text, to_unix_s
from tandem_operator.plan.views import PoolView

STAND_BACK_S = 600.0
LATE_S = 30.0
"""So late a write of ours may come: its plan was under way when a newer decision was made."""
WRITE_S = 30.0
MOST_DECISIONS = 10
PATIENCE_S = 15.0
"""How long the load may be unknown before anybody is told: one look may fail."""


@dataclass(frozen=True)
class Scaled:
    """The last decision for one pool."""

    size: int
    """The size that it was made for: with another one live, it has no effect."""
    target: int
    shadow: bool = False
    decision: Decision | None = None
    """None: there was none, see `trouble`."""
    trouble: Trouble | None = None
    published: PoolScaling = field(default_factory=PoolScaling)
    """For the status."""
    published_s: float = float("-inf")
    published_state: ScalingState = field(default_factory=ScalingState)
    blind_since_s: float | None = None
    """Since when the load is not known."""
    foreign_s: float | None = None
    """When somebody else last wrote the size."""
    asked: tuple[tuple[float, int], ...] = ()
    """When each size was last to be written, of the last LATE_S."""

    @property
    def writes(self) -> bool:
        """Whether the target is to be written."""
        return not self.shadow and self.trouble is None and self.target != self.size


def settle(
    before: Scaled | None,
    pool: PoolView,
    decision: Decision,
    now_s: float,
    *,
    shadow: bool,
    unknown: Trouble | None = None,
) -> Scaled:
    """The pool's new decision, with what the status is to say. `unknown`: why the load is not
    known, where that is more than that pods do not answer."""
    size = pool.spec.replicas
    found = before or _found(pool)
    foreign_s = _foreign(before, pool, now_s)
    contended = foreign_s is not None and 0.0 <= now_s - foreign_s < STAND_BACK_S
    blind = decision.numbers.ready > 0 and decision.reason == ScaleReason.NO_DATA
    blind = blind or unknown is not None
    blind_s = (found.blind_since_s or now_s) if blind else None
    trouble = None
    if contended and not shadow:
        assert foreign_s is not None
        trouble = _contended(pool, foreign_s)
    elif blind_s is not None and now_s - blind_s >= PATIENCE_S:
        trouble = unknown or _blind(pool)
    new = replace(
        found,
        size=size,
        target=decision.target,
        shadow=shadow,
        decision=decision,
        trouble=trouble,
        blind_since_s=blind_s,
        foreign_s=foreign_s if contended else None,
    )
    new = replace(new, asked=_asked(found, now_s))
    if new.writes:
        earlier = tuple(entry for entry in new.asked if entry[1] != new.target)
        new = replace(new, asked=(*earlier, (now_s, new.target)))
    return _published(new, found, decision, now_s)


def troubled(before: Scaled | None, pool: PoolView, trouble: Trouble) -> Scaled:
    """A pool that cannot be decided on keeps its size."""
    size = pool.spec.replicas
    found = before or _found(pool)
    published = found.published.model_copy(update={"schedule": None})
    return replace(
        found, size=size, target=size, decision=None, trouble=trouble, published=published
    )


def _found(pool: PoolView) -> Scaled:
    """What another operator left in the status."""
    size, status = pool.spec.replicas, pool.status.scaling or PoolScaling()
    return Scaled(size, size, published=status, published_state=state_of(status.state))


def _foreign(before: Scaled | None, pool: PoolView, now_s: float) -> float | None:
    """When somebody else last wrote the pool's size; a new operator reads it from the status."""
    if before is None:
        until = (pool.status.scaling or PoolScaling()).stands_back_until
        return to_unix_s(until) - STAND_BACK_S if until else None
    ours = {before.size, *(size for _, size in _asked(before, now_s))}
    ours |= {before.target} if before.writes else set()
    return before.foreign_s if pool.spec.replicas in ours else now_s


def _asked(before: Scaled, now_s: float) -> tuple[tuple[float, int], ...]:
    return tuple((at_s, size) for at_s, size in before.asked if 0.0 <= now_s - at_s < LATE_S)


def _contended(pool: PoolView, foreign_s: float) -> Trouble:
    return Trouble(
        Reason.REPLICAS_CONTENDED,
        f"somebody else wrote the size of Pool {pool.name}, which the policy decides; it leaves "
        f"the size alone until {to_text(foreign_s + STAND_BACK_S)}. Remove the other writer (an "
        "HPA or a ScaledObject on the Pool), or remove scaling from the fleet's pool",
    )


def _blind(pool: PoolView) -> Trouble:
    return Trouble(
        Reason.NO_LOAD_DATA,
        f"the pods of Pool {pool.name} do not say how much work they have; it keeps its size "
        "until they do. See the operator's log for their answers",
    )


def _published(new: Scaled, before: Scaled, decision: Decision, now_s: float) -> Scaled:
    """A decision that is carried out is published at once, all else now and then: where the size
    stays as it is, each look may want another one."""
    until = None
    if new.foreign_s is not None:
        until = to_text(new.foreign_s + STAND_BACK_S)
    schedule = _schedule(decision)
    decisions = before.published.decisions
    entry = _entry(new, decision, now_s)
    stale = not 0.0 <= now_s - before.published_s < WRITE_S
    news = decision.target != new.size and not (decisions and _same(decisions[-1], entry))
    news = news and (stale or not entry.shadow)
    if news:
        decisions = (*decisions, entry)[-MOST_DECISIONS:]
    drifted = stale and changed(before.published_state, decision.state)
    told = (before.published.stands_back_until, before.published.schedule)
    if not news and not drifted and told == (until, schedule):
        return new
    text = state_text(decision.state)
    return replace(
        new,
        published=PoolScaling(
            decisions=decisions, state=text, stands_back_until=until, schedule=schedule
        ),
        published_s=now_s,
        published_state=decision.state,
    )


def _schedule(decision: Decision) -> ScheduleInForce | None:
    """The schedule whose bounds hold, if one's do."""
    numbers = decision.numbers
    if not numbers.schedule:
        return None
    return ScheduleInForce(
        name=numbers.schedule,
        min_replicas=numbers.min_replicas,
        max_replicas=numbers.max_replicas,
    )


def _same(last: ScalingDecision, new: ScalingDecision) -> bool:
    """Whether a decision was published already: it is repeated until it has been carried out."""
    return (last.replicas_before, last.replicas, last.shadow) == (
        new.replicas_before,
        new.replicas,
        new.shadow,
    )


def _entry(scaled: Scaled, decision: Decision, now_s: float) -> ScalingDecision:
    numbers = decision.numbers
    latency_ms = numbers.latency_ms
    return ScalingDecision(
        time=to_text(now_s),
        replicas_before=scaled.size,
        replicas=decision.target,
        reason=decision.reason.value,
        shadow=scaled.shadow or scaled.trouble is not None,
        demand=round(numbers.demand),
        capacity=round(numbers.capacity),
        need_percent=round(100 * numbers.need),
        growth_percent=round(100 * numbers.growth),
        latency_milliseconds=None if latency_ms is None else round(latency_ms),
        target_milliseconds=round(numbers.target_ms),
        startup_seconds=round(numbers.startup_s),
        ready=numbers.ready,
        starting=numbers.starting,
        limited_by=numbers.limited_by,
        schedule=numbers.schedule,
    )


def sentence(decision: ScalingDecision, pool: str) -> str:
    """A decision in words."""
    learned = decision.capacity > 0
    load = (
        f"load of {decision.need_percent / 100:g} replicas "
        f"({decision.demand} at {decision.capacity} each)"
        if learned
        else "what a replica can do is not learned yet"
    )
    growth = f", growth {decision.growth_percent / 100:g}" if decision.growth_percent > 100 else ""
    latency = (
        f", {decision.latency_milliseconds} ms of {decision.target_milliseconds} ms"
        if decision.latency_milliseconds is not None
        else ""
    )
    limit = f", limited by {decision.limited_by}" if decision.limited_by else ""
    limit += f", in schedule {decision.schedule}" if decision.schedule else ""
    return (
        f"Pool {pool}: {decision.replicas_before} -> {decision.replicas} replicas, "
        f"{decision.reason}: {load}{growth}{latency}; {decision.ready} ready, "
        f"{decision.starting} starting{limit}"
    )
