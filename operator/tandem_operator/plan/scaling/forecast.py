"""How much the load may grow until a new replica serves, learned from how it grew before.

For each past moment the factor by which need grew within a start-up time after it is counted,
weighted by the need, in a small histogram; moments are kept apart by whether the load had fallen,
stayed or risen before them. The forecast is a quantile of the histogram of moments like this one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from tandem_operator.plan.scaling.state import CLASSES, GROWTH_BINS, Sample, ScalingState

SLOTS = 8
"""Samples in a start-up time."""
BACK = 2
"""Samples over which a rise or fall is judged."""
TURN = 0.1
"""A change by more than this share is a rise or a fall."""
LEAST_NEED = 0.5
"""Of replicas: growth of less is growth of nothing."""
FORGET = 0.998
"""What a new observation leaves of older ones of its class."""
PRIOR = 4.0
"""Weight of "it does not grow" before anything was seen."""
SHORTEST_S = 8.0
LAST_BIN = len(GROWTH_BINS) - 1


def look(state: ScalingState, need: float, startup_s: float, now_s: float) -> ScalingState:
    """The state with this moment's need in it, and the growth of the moment a start-up ago."""
    startup_s = max(startup_s, SHORTEST_S)
    slot_s = startup_s / SLOTS
    past = list(state.past)
    if past and 0.0 <= now_s - past[-1].at_s < slot_s:
        past[-1] = replace(past[-1], need=max(past[-1].need, need))
        return replace(state, past=tuple(past))
    if past and not 0.0 <= now_s - past[-1].at_s <= max(startup_s, 2.0 * slot_s):
        past = []  # The clock was set, or nobody looked: what came between is not known.
    past.append(Sample(now_s, need))
    # Every sample but the new one has ended; the latest that is a start-up time old can be judged.
    first = max((i for i, s in enumerate(past) if s.at_s <= now_s - startup_s), default=0)
    growth = state.growth
    if first >= BACK:
        now, before = past[first], past[first - BACK]
        base = max(now.need, LEAST_NEED)
        grown = max(sample.need for sample in past[first + 1 :]) / base
        growth = _counted(growth, _class(now.need, before.need), grown, base)
        past = past[first - BACK :]
    return replace(state, past=tuple(past), growth=growth)


def factor(state: ScalingState, need: float, percent: int) -> float:
    """By how much need may grow within a start-up time, in `percent` of such moments."""
    if percent <= 0:
        return 1.0
    before = state.past[-1 - BACK].need if len(state.past) > BACK else need
    kind = _class(need, before)
    # A rising load is never thought to grow less than one that stays.
    return max(_quantile(counts, percent / 100.0) for counts in state.growth[: kind + 1])


def _class(need: float, before: float) -> int:
    need, before = max(need, LEAST_NEED), max(before, LEAST_NEED)
    if need > (1.0 + TURN) * before:
        return CLASSES - 1
    return 0 if need < (1.0 - TURN) * before else 1


def _counted(
    growth: tuple[tuple[float, ...], ...], kind: int, grown: float, weight: float
) -> tuple[tuple[float, ...], ...]:
    # Growth by less than a turn is noise.
    index = 0 if grown <= 1.0 + TURN else min(bisect_left(GROWTH_BINS, grown), LAST_BIN)
    counts = [FORGET * count for count in growth[kind]]
    counts[index] += weight
    return (*growth[:kind], tuple(counts), *growth[kind + 1 :])


def _quantile(counts: tuple[float, ...], share: float) -> float:
    left = share * (PRIOR + sum(counts)) - PRIOR
    for value, count in zip(GROWTH_BINS, counts, strict=True):
        left -= count
        if left <= 0.0:
            return value
    return GROWTH_BINS[-1]
