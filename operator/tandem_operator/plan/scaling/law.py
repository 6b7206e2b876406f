"""`decide`: from one look at a pool to the size that it should have.

1. Learn: what steps cost, how long a start-up takes, what followed on such loads (capacity,
   forecast).
2. Feed forward: the load in tokens over what a replica can do is the need (need), or what is likely
   to be needed by the time that a new replica serves, if that is more.
3. Feed back: a percentile over its target although the load should fit takes a share off the
   learned capacity; a percentile well under it gives some back.
4. Bands: over the high one the pool grows at once, to their middle. It shrinks only if the largest
   need of the last hold time fits the smaller size under the low one.
5. Limits: steps, bounds.

No traffic is load zero; a load that could not be measured changes nothing. Replicas that start are
part of the size, so they are not asked for twice, and of no capacity until they serve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from statistics import median

from tandem_operator.plan.scaling import forecast
from tandem_operator.plan.scaling.capacity import fit, remember
from tandem_operator.plan.scaling.decision import Decision, Numbers, ScaleReason
from tandem_operator.plan.scaling.feedback import trimmed
from tandem_operator.plan.scaling.need import Need, arrived, need_of
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import Sample, ScalingState
from tandem_operator.plan.scaling.streams import served, service_s, stream_work
from tandem_operator.plan.scaling.window import Load, PoolWindow

STARTUP_WEIGHT = 0.3
"""Of a newly measured start-up time."""
LONGEST_STARTUP_S = 1800.0
HOLD = 2.0
"""Start-up times that a need must be gone before the pool shrinks."""
MOST_HELD = 16
LEAST_NEED = 0.01
"""Of replicas: growth of less is told as none."""
ALMOST = 1e-6
"""What rounding may add to a need without asking for one more replica."""


@dataclass(frozen=True)
class _Wish:
    """A size before limits."""

    target: int
    reason: ScaleReason


def decide(
    policy: Policy,
    state: ScalingState,
    window: PoolWindow,
    now_s: float,
    *,
    late_elsewhere: bool = False,
) -> Decision:
    """The size that the pool should have from now on. The caller keeps the decision's state.

    `late_elsewhere`: another pool of the fleet is short, which explains a late first token.
    """
    state = _watched(state, window, now_s)
    startup_s = state.startup_s or policy.startup_s
    numbers = Numbers(
        target_ms=policy.target_ms,
        startup_s=startup_s,
        ready=window.ready,
        starting=len(window.starting_s),
        min_replicas=policy.min_replicas,
        max_replicas=policy.max_replicas,
        schedule=policy.min_from or policy.max_from,
    )
    if window.load is None:
        wish = _Wish(window.size, ScaleReason.NO_DATA)
        return _limited(policy, state, window, wish, numbers, now_s)
    load = window.load
    if load.requests > 0 or load.queued_requests > 0 or load.streams > 0:
        state = replace(state, last_load_s=now_s)
    # Of the looks before: else more streams would seem longer ones, which may wait for longer.
    stream_s, work = service_s(state), load.prompt_tokens
    if policy.role == "decode":
        state = served(state, load, window.window_s)
        work = stream_work(state, load, window)
    state = replace(
        state,
        steps=remember(state.steps, load.steps),
        arrivals=arrived(state.arrivals, window.window_s, work, policy.window_s),
    )
    cost = fit(state.steps, state.cost)
    state = replace(state, cost=cost)
    need = need_of(policy, cost, state, load, startup_s, stream_s) if cost else None
    if need is None or not need.capacity:
        wish = _unlearned(policy, state, window, load, now_s)
        return _limited(policy, state, window, wish, numbers, now_s)
    state = trimmed(
        policy, state, window, load, need.replicas, now_s, late_elsewhere=late_elsewhere
    )
    return _by_need(policy, state, window, need, numbers, now_s)


def _by_need(
    policy: Policy,
    state: ScalingState,
    window: PoolWindow,
    need: Need,
    numbers: Numbers,
    now_s: float,
) -> Decision:
    """The decision once the load is known in replicas."""
    startup_s = numbers.startup_s
    replicas = need.replicas / state.trim
    # A trim that changes is no growth, and neither is what waits: it is this pool's own size.
    state = forecast.look(state, need.asked, startup_s, now_s)
    idle = _idle(policy, state, now_s)
    if idle:
        # A pool that sleeps holds nothing, so that there is nothing to write while it does.
        state = replace(state, held=(), past=())
    likely = forecast.likely(state, need.asked, 0 if idle else policy.forecast_percent)
    likely = max(need.replicas, likely) / state.trim
    hold_s = HOLD * startup_s if policy.hold_s is None else policy.hold_s
    state = replace(state, held=_held(state.held, Sample(now_s, likely), hold_s))
    held = state.held[0].need
    numbers = replace(
        numbers,
        demand=need.demand,
        capacity=need.capacity * state.trim,
        need=replicas,
        growth=likely / replicas if replicas > LEAST_NEED else 1.0,
        likely=likely,
        held=held,
        latency_ms=_latency(policy, window),
    )
    wish = _banded(policy, state, window, numbers, now_s)
    return _limited(policy, state, window, wish, numbers, now_s)


def _banded(
    policy: Policy,
    state: ScalingState,
    window: PoolWindow,
    numbers: Numbers,
    now_s: float,
) -> _Wish:
    size, high, low = window.size, policy.high_percent / 100.0, policy.low_percent / 100.0
    if size == 0 and not _asked(window):
        return _Wish(0, ScaleReason.NO_TRAFFIC)
    if _idle(policy, state, now_s):
        return _Wish(0, ScaleReason.IDLE)
    grow = _replicas(numbers.likely / high)
    if size == 0:
        grow = max(grow, policy.floor)
    shrink = _replicas(numbers.held / low)
    if grow > size:
        if size == 0:
            return _Wish(grow, ScaleReason.WAKE)
        # To the middle of the bands, or a load that rises slowly adds replicas one by one.
        grow = _replicas(2.0 * numbers.likely / (high + low))
        if _replicas(state.trim * numbers.likely / high) <= size:
            return _Wish(grow, ScaleReason.LATENCY_OVER_TARGET)
        growing = _replicas(numbers.need / high) <= size
        return _Wish(grow, ScaleReason.FORECAST if growing else ScaleReason.LOAD_OVER_BAND)
    if shrink >= size:
        return _Wish(size, _kept(numbers, low, size))
    return _smaller(policy, state, window, max(shrink, policy.floor), now_s)


def _kept(numbers: Numbers, low: float, size: int) -> ScaleReason:
    """Why a size stays."""
    smaller = _replicas(numbers.likely / low) < size
    return ScaleReason.HELD if smaller else ScaleReason.WITHIN_BAND


def _smaller(
    policy: Policy, state: ScalingState, window: PoolWindow, target: int, now_s: float
) -> _Wish:
    """A size that the load of the last hold time fits."""
    if target >= window.size:
        return _Wish(window.size, ScaleReason.WITHIN_BAND)
    # Before anything followed for a start-up time, the size that is there is the best guess.
    if forecast.known(state.seen) < forecast.SLOTS:
        return _Wish(window.size, ScaleReason.HELD)
    if state.last_in_s is not None and 0.0 <= now_s - state.last_in_s < policy.in_interval_s:
        return _Wish(window.size, ScaleReason.HELD)
    return _Wish(target, ScaleReason.LOAD_UNDER_BAND)


def _asked(window: PoolWindow) -> bool:
    """Whether anybody wants something of the pool."""
    load = window.load
    return load is not None and (load.requests > 0 or load.queued_requests > 0)


def _idle(policy: Policy, state: ScalingState, now_s: float) -> bool:
    if policy.idle_s is None or policy.min_replicas > 0 or state.last_load_s is None:
        return False
    return now_s - state.last_load_s >= policy.idle_s


def _unlearned(
    policy: Policy, state: ScalingState, window: PoolWindow, load: Load, now_s: float
) -> _Wish:
    """Before any step was seen: no traffic still is load zero, and zero replicas must wake."""
    asked = _asked(window)
    if window.size == 0:
        wanted = policy.floor if asked else 0
        return _Wish(wanted, ScaleReason.WAKE if asked else ScaleReason.NO_TRAFFIC)
    if asked or load.streams > 0:
        return _Wish(window.size, ScaleReason.NOT_LEARNED)
    if _idle(policy, state, now_s):
        return _Wish(0, ScaleReason.IDLE)
    return _Wish(window.size, ScaleReason.NO_TRAFFIC)


def _limited(
    policy: Policy,
    state: ScalingState,
    window: PoolWindow,
    wish: _Wish,
    numbers: Numbers,
    now_s: float,
) -> Decision:
    """The wish within step limits and bounds; bounds win."""
    size, target, limited_by, schedule = window.size, wish.target, "", ""
    if target > size and target - size > policy.largest_out(size):
        target, limited_by = size + policy.largest_out(size), "step"
    if 0 < target < size and size - target > policy.largest_in(size):
        target, limited_by = size - policy.largest_in(size), "step"
    resting = target == 0 and policy.min_replicas == 0
    low = 0 if resting else policy.floor
    if target > policy.max_replicas:
        target, limited_by, schedule = policy.max_replicas, "maxReplicas", policy.max_from
    if target < low:
        target, limited_by, schedule = low, "minReplicas", policy.min_from
    reason = wish.reason
    if target != size and (wish.target - size) * (target - size) <= 0:
        # Not what the load asks for.
        reason = ScaleReason.SCHEDULE if schedule else ScaleReason.OUT_OF_BOUNDS
    if target < size:
        state = replace(state, last_in_s=now_s)
    numbers = replace(
        numbers,
        limited_by=limited_by,
        schedule=schedule if limited_by.endswith("Replicas") else numbers.schedule,
    )
    return Decision(target, reason, numbers, state)


def _watched(state: ScalingState, window: PoolWindow, now_s: float) -> ScalingState:
    """What can be learned without any load: start-ups, and since when so many replicas serve."""
    if window.startup_s:
        new_s = min(median(window.startup_s), LONGEST_STARTUP_S)
        old_s = state.startup_s
        mixed_s = new_s if old_s is None else old_s + STARTUP_WEIGHT * (new_s - old_s)
        state = replace(state, startup_s=mixed_s)
    if window.ready != state.ready:
        state = replace(state, ready=window.ready, ready_since_s=now_s)
    if state.last_load_s is None:
        state = replace(state, last_load_s=now_s)
    return state


def _held(held: tuple[Sample, ...], new: Sample, hold_s: float) -> tuple[Sample, ...]:
    """The needs of the last hold time that no later one has exceeded."""
    kept = [s for s in held if s.need > new.need and 0.0 <= new.at_s - s.at_s < hold_s]
    kept.append(new)
    while len(kept) > MOST_HELD:
        # The two most alike become one that is as large as the first and as young as the second.
        i = min(range(len(kept) - 1), key=lambda k: kept[k].need - kept[k + 1].need)
        kept[i : i + 2] = [Sample(kept[i + 1].at_s, kept[i].need)]
    return tuple(kept)


def _latency(policy: Policy, window: PoolWindow) -> float | None:
    load = window.load
    if load is None:
        return None
    return load.tpot_ms if policy.role == "decode" else load.ttft_ms


def _replicas(need: float) -> int:
    return ceil(need - ALMOST)
