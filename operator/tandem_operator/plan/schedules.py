"""A policy's schedules, as the law of a pool takes them, or why they cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tandem_operator.api.fleet import Scaling
from tandem_operator.api.scaling_policy import (
    MAX_WINDOW_SECONDS,
    ScalingPolicySpec,
    Schedule,
    ScheduleBounds,
)
from tandem_operator.plan.scaling import schedule as law
from tandem_operator.plan.scaling.policy import Policy

Field = Literal["prefill", "decode"]


def schedules_of(spec: ScalingPolicySpec, field: Field) -> tuple[law.Schedule, ...]:
    """Those that name the pool, in the policy's order."""
    return tuple(
        law.Schedule(
            entry.name,
            entry.cron,
            float(entry.duration_seconds),
            entry.time_zone or "UTC",
            bounds.min_replicas,
            bounds.max_replicas,
        )
        for entry in spec.schedules or ()
        if (bounds := _bounds(entry, field)) is not None
    )


def schedule_fault(spec: ScalingPolicySpec, field: Field, own: Scaling) -> str | None:
    """What is wrong with the schedules of a pool whose bounds are `own`, and what to do instead.

    What the API server refuses is checked too: the simulator has none.
    """
    names = [entry.name for entry in spec.schedules or ()]
    for entry in spec.schedules or ():
        fault = _fault(entry, field, own)
        if names.count(entry.name) > 1:
            fault = "two schedules have this name; rename one"
        if fault is not None:
            return f"schedule {entry.name}: {fault}"
    return None


def least_gpus(pools: Iterable[Policy]) -> tuple[int, str]:
    """The most GPUs that lower bounds take together, outside of any schedule or in the windows of
    one, and that schedule ("": none)."""
    members = list(pools)
    names = ["", *(schedule.name for pool in members for schedule in pool.schedules)]
    needs = [(sum(_least_gpus(pool, name) for pool in members), name) for name in names]
    return max(needs, key=lambda need: need[0])


def _least_gpus(pool: Policy, name: str) -> int:
    least = pool.min_replicas
    for schedule in pool.schedules:
        if schedule.name == name and schedule.min_replicas is not None:
            least = schedule.min_replicas
    return pool.gpus_per_replica * least


def _bounds(entry: Schedule, field: Field) -> ScheduleBounds | None:
    return entry.prefill if field == "prefill" else entry.decode


def _fault(entry: Schedule, field: Field, own: Scaling) -> str | None:
    try:
        law.check(entry.cron, entry.time_zone or "UTC")
    except law.ScheduleError as error:
        return str(error)
    if entry.duration_seconds > MAX_WINDOW_SECONDS:
        return f"durationSeconds must be at most {MAX_WINDOW_SECONDS}, a week"
    if entry.prefill is None and entry.decode is None:
        return "give prefill, decode or both: the pools whose bounds are others in a window"
    bounds = _bounds(entry, field)
    if bounds is None:
        return None
    least, most = bounds.min_replicas, bounds.max_replicas
    if least is None and most is None:
        return f"give minReplicas or maxReplicas of {field}, or both"
    if least is not None and most is not None and least > most:
        return f"minReplicas of {field} exceeds maxReplicas; lower one or raise the other"
    for bound, value in (("minReplicas", least), ("maxReplicas", most)):
        if value is not None and not own.min_replicas <= value <= own.max_replicas:
            return (
                f"{bound} {value} of {field} is not between spec.{field}.scaling's "
                f"{own.min_replicas} and {own.max_replicas}; a schedule stays within the fleet's "
                "bounds, so change it or them"
            )
    return None
