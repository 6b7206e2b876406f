"""The need that is likely by the time that a new replica serves, learned from what came before.

Each moment is remembered by its need, and a start-up time later by what was needed then. Of all
moments like this one (of about as many replicas) it is known how many there were and how much work
followed at which need, so the size to have can be priced: a replica that is kept at such moments
costs as often as they come, and work that needs more than is there misses its target. Bursts out of
nothing are provided for where they carry enough work and come often enough, and not otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import log

from tandem_operator.plan.scaling.state import Sample, ScalingState, Seen

SLOTS = 8
"""Samples in a start-up time."""
LEVELS = tuple(0.25 * 2.0 ** (i / 2.0) for i in range(24))
"""Needs that divide moments into kinds, half an octave each; the last is about 700 replicas."""
FORGET = 0.998
"""What a new moment leaves of older ones of its kind."""
MOST_SEEN = 48
"""Pairs of a kind and what followed: they are kept in a status, so the most alike become one."""
SMALL = 0.1
"""Replicas: needs under it are alike."""
LEAST_SEEN = 1e-3
"""Moments; what is left of fewer is forgotten."""
MARGIN = 0.5
"""Of what the size is over the mean, in octaves: what is added while little is known."""
LITTLE = 12.0
"""Moments; with so many half of that is added."""
PLAIN = 9.0
"""The price over which growth that was never seen is provided for."""
PRIOR = 4.0
"""Weight of "the need stays" before anything was seen."""
SHORTEST_S = 8.0


def look(state: ScalingState, need: float, startup_s: float, now_s: float) -> ScalingState:
    """The state with this moment's need in it, and what followed on the moment a start-up ago."""
    startup_s = max(startup_s, SHORTEST_S)
    slot_s = startup_s / SLOTS
    past = list(state.past)
    if past and 0.0 <= now_s - past[-1].at_s < slot_s:
        past[-1] = replace(past[-1], need=max(past[-1].need, need))
        return replace(state, past=tuple(past))
    if past and not 0.0 <= now_s - past[-1].at_s <= max(startup_s, 2.0 * slot_s):
        past = []  # The clock was set, or nobody looked: what came between is not known.
    seen = state.seen
    if past:
        # The last sample has ended; the latest one that is a start-up time older asked for it.
        ended = past[-1]
        first = max((i for i, s in enumerate(past) if s.at_s <= ended.at_s - startup_s), default=-1)
        if first >= 0:
            seen = _counted(seen, Seen(level(past[first].need), ended.need, 1.0))
            past = past[first:]
    past.append(Sample(now_s, need))
    return replace(state, past=tuple(past), seen=seen)


def likely(state: ScalingState, need: float, percent: int) -> float:
    """The need to provide for, at least `need`. At `percent` 90 work that misses its target is
    worth nine times the replicas that would have kept it."""
    if percent <= 0:
        return need
    price = percent / max(100.0 - percent, 1.0)
    kind, largest = level(need), need * _growth(price, known(state.seen))
    for group in _groups(state.seen, price):
        if group.kind <= kind:
            largest = max(largest, group.size)
    return largest


def _growth(price: float, moments: float) -> float:
    """Of the need, for what was never seen: where the chance of a growth falls as the growth rises,
    the cheapest is the price over what is known."""
    return max(1.0, price / PLAIN * LITTLE / (LITTLE + moments))


def known(seen: tuple[Seen, ...]) -> float:
    """How many moments there were, older ones counted less."""
    return sum(one.moments for one in seen)


def level(need: float) -> int:
    """The kind of a moment of this need."""
    return bisect_right(LEVELS, need)


@dataclass(frozen=True)
class _Group:
    """Neighbouring kinds that get one size."""

    kind: int
    """The lowest."""
    seen: list[Seen]
    size: float


def _groups(seen: tuple[Seen, ...], price: float) -> list[_Group]:
    """Sizes by kind that never fall as the load rises: kinds that would are priced together."""
    groups: list[_Group] = []
    for kind in sorted({one.kind for one in seen}):
        mine = [one for one in seen if one.kind == kind]
        group = _Group(kind, mine, _cheapest(mine, price))
        while groups and groups[-1].size > group.size:
            last = groups.pop()
            both = last.seen + group.seen
            group = _Group(last.kind, both, _cheapest(both, price))
        groups.append(group)
    moments = known(seen)
    return [replace(group, size=_safe(group, moments)) for group in groups]


def _cheapest(seen: list[Seen], price: float) -> float:
    """The need for which keeping replicas and missing work cost the least together: a quantile of
    what followed, weighted by its work."""
    moments = PRIOR + sum(one.moments for one in seen)
    largest_first = sorted(seen, key=lambda one: -one.followed)
    best, cheapest, missed = 0.0, price * sum(one.followed * one.moments for one in seen), 0.0
    for one in largest_first:
        cost = one.followed * moments + price * missed
        if cost <= cheapest:
            best, cheapest = one.followed, cost
        missed += one.followed * one.moments
    return best


def _safe(group: _Group, moments: float) -> float:
    """With something added while little is known: the largest burst so far is a poor bound for the
    next, the more so the more it exceeds what is usual. Load that stays gets nothing."""
    usual = sum(one.followed * one.moments for one in group.seen)
    usual = max(usual / sum(one.moments for one in group.seen), LEVELS[0])
    over = max(group.size / usual, 1.0)
    return group.size * float(over ** (MARGIN * LITTLE / (LITTLE + moments)))


def _counted(seen: tuple[Seen, ...], new: Seen) -> tuple[Seen, ...]:
    """With one more moment, which its kind's older ones fade behind."""
    kept = [new]
    for one in seen:
        moments = one.moments * (FORGET if one.kind == new.kind else 1.0)
        if moments > LEAST_SEEN:
            kept.append(Seen(one.kind, one.followed, moments))
    kept.sort()
    if len(kept) > MOST_SEEN:
        i = min(range(len(kept) - 1), key=lambda k: _apart(kept[k], kept[k + 1]))
        one, other = kept[i : i + 2]
        moments = one.moments + other.moments
        work = one.followed * one.moments + other.followed * other.moments
        # Of two kinds, the lower one: what followed on less load counts for more of it too.
        kept[i : i + 2] = [Seen(one.kind, work / moments, moments)]
    return tuple(kept)


def _apart(one: Seen, other: Seen) -> float:
    """What is lost if two neighbours become one: little where they are alike, or seldom seen."""
    kinds = abs(other.kind - one.kind)
    gap = abs(log((other.followed + SMALL) / (one.followed + SMALL)))
    return (gap + kinds) * min(one.moments, other.moments)
