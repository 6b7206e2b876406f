"""What policies are measured against: the least static sizes, a clairvoyant plan, a lower bound."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from tandem.simulate.scalers import Choice, Fixed
from tandem.traces.trace import Trace
from tandem_operator.plan.scaling.window import PoolWindow

from benchmarks.autoscaling.compiled.state import FINISHED, SLOTS
from benchmarks.autoscaling.fast import FastRun
from benchmarks.autoscaling.resample import resample
from benchmarks.autoscaling.setup import (
    LEAST_TTFT_S,
    FleetKind,
    Score,
    make_setup,
    play,
    prompt_s,
    score,
)

GOAL: Final = 0.99
UNDER_PLENTY: Final = 0.005
"""Where no size keeps GOAL: what the static sizes and the plan may keep less than many replicas."""
PLENTY: Final = 16
"""Replicas of a pool that is not to be the bottleneck."""
SLOT_S: Final = 10.0
LONGEST_WINDOW: Final = 6
"""Slots over which a burst of prompts is looked at."""
MARGINS: Final = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5)
SHARES: Final = (0.5, 0.6, 0.7, 0.8, 0.9)
_ROUNDS: Final = 3


@dataclass(frozen=True)
class StaticPeak:
    """The fewest replicas that keep `goal` of the requests, and the trace that needs so many."""

    trace: Trace
    factor: float
    sizes: Mapping[str, int]
    score: Score
    goal: float = GOAL
    """What it was to keep."""

    @property
    def replicas(self) -> int:
        return sum(self.sizes.values())


def scaled_to_peak(
    kind: FleetKind, trace: Trace, replicas: int, startup_s: float, kernel_s: float = 10.0
) -> StaticPeak:
    """The trace at seed 0, multiplied until its static peak is about so many replicas."""
    factor = replicas / _estimate(needs(kind, trace, startup_s, PLENTY))
    for _ in range(_ROUNDS):
        larger = resample(trace, factor, 0, kernel_s)
        peak = static_peak(kind, larger, factor, startup_s, replicas)
        if abs(peak.replicas - replicas) <= max(1, replicas // 24):
            break
        factor *= replicas / peak.replicas
    return peak


def static_peak(
    kind: FleetKind, trace: Trace, factor: float, startup_s: float, about: int
) -> StaticPeak:
    """For GOAL; where no size keeps that, for a little less than what any size keeps."""
    plenty = min(3 * about, SLOTS)
    peak = _static_peak(kind, trace, factor, startup_s, plenty, GOAL)
    if peak.score.attained >= GOAL:
        return peak
    goal = peak.score.attained - UNDER_PLENTY
    return _static_peak(kind, trace, factor, startup_s, plenty, goal)


def _static_peak(
    kind: FleetKind, trace: Trace, factor: float, startup_s: float, plenty: int, goal: float
) -> StaticPeak:
    """Prefill first, with answers of one token; then decode; then both, if need be."""
    short = replace(trace, output_tokens=[1] * len(trace))

    def attained(prefill: int, decode: int, of: Trace = trace) -> Score:
        sizes = {"prefill": prefill, "decode": decode}
        return score(play(make_setup(kind, sizes, startup_s), of, Fixed()), kind)

    prefill = _least(lambda n: attained(n, 1, short).attained >= goal, plenty)
    decode = _least(lambda n: attained(prefill, n).attained >= goal - 0.005, plenty)
    found = attained(prefill, decode)
    while found.attained < goal and max(prefill, decode) < plenty:
        sizes = [(prefill + 1, decode), (prefill, decode + 1)]
        scores = [attained(*size) for size in sizes]
        better = int(scores[1].attained > scores[0].attained)
        (prefill, decode), found = sizes[better], scores[better]
    return StaticPeak(trace, factor, {"prefill": prefill, "decode": decode}, found, goal)


def _least(enough: Callable[[int], bool], most: int) -> int:
    """The least number that is enough, by bisection; more never is worse."""
    return 1 + bisect_right(range(1, most), False, key=enough)


def _estimate(needed: Needs) -> float:
    """Static replicas of both pools: what all but a hundredth of the slots need."""
    total = 0.0
    for values in needed.by_pool.values():
        total += sorted(values)[int(GOAL * (len(values) - 1))]
    return max(total, 0.1)


@dataclass(frozen=True)
class Needs:
    """What a trace needs in each slot, in fractions of a replica, as only hindsight knows."""

    by_pool: Mapping[str, Sequence[float]]
    work_hours: float
    """GPU-hours of its work alone, on replicas that are always full: no plan can take fewer."""


def needs(kind: FleetKind, trace: Trace, startup_s: float, plenty: int) -> Needs:
    """From the trace and from a run with plenty of replicas."""
    sizes = {"prefill": plenty, "decode": plenty}
    run = play(make_setup(kind, sizes, startup_s), trace, Fixed())
    slots = math.ceil(run.ended_s / SLOT_S) + 1
    uncached = np.asarray(trace.prompt_tokens) - run.cached
    slot = (np.asarray(trace.arrival_s) / SLOT_S).astype(np.int64)
    per_token_s = prompt_s(kind.replica, 2048) / 2048
    seconds = list(map(float, per_token_s * np.bincount(slot, uncached, slots)))
    streams = _streams(run, slots)
    most = most_streams(kind, trace)
    prefill = _prompt_needs(seconds)
    decode = [count / most for count in streams]
    hours = (sum(seconds) + sum(decode) * SLOT_S) * kind.replica.gpus / 3600
    return Needs({"prefill": prefill, "decode": decode}, hours)


def _prompt_needs(seconds: Sequence[float]) -> list[float]:
    """In each slot the largest work / (window + slack) of the windows that hold it."""
    needed = [0.0] * len(seconds)
    for first in range(len(seconds)):
        work = 0.0
        for width in range(1, min(LONGEST_WINDOW, len(seconds) - first) + 1):
            work += seconds[first + width - 1]
            rate = work / (width * SLOT_S + LEAST_TTFT_S)
            for slot in range(first, first + width):
                needed[slot] = max(needed[slot], rate)
    return needed


def _streams(run: FastRun, slots: int) -> list[float]:
    """Running streams on average in each slot."""
    begin = np.asarray(run.trace.arrival_s) + run.first_token_s
    finished = run.fate == FINISHED
    edges = np.arange(slots + 1) * SLOT_S

    def seconds_before(at_s: Any) -> Any:
        """Of all moments in `at_s`, the seconds that have passed since, at each edge."""
        ordered = np.sort(at_s)
        count = np.searchsorted(ordered, edges)
        return count * edges - np.concatenate(([0.0], np.cumsum(ordered)))[count]

    passed = seconds_before(begin[finished]) - seconds_before(run.finished_s[finished])
    return list(map(float, np.diff(passed) / SLOT_S))


def most_streams(kind: FleetKind, trace: Trace) -> int:
    """Streams of the trace's mean context that a replica runs within TPOT."""
    total = sum(trace.prompt_tokens) + sum(trace.output_tokens) / 2
    context = total / len(trace)
    widest = min(64, int(kind.replica.kv_capacity_tokens / context))
    fitting = [
        b for b in range(1, widest + 1) if kind.replica.decode_s(b, b * context) <= kind.tpot_s
    ]
    return max(fitting, default=1)


@dataclass
class Clairvoyant:
    """Asks for each slot's need a start-up before it comes; a gap shorter than that is kept."""

    plan: Mapping[str, Sequence[int]]
    most: Mapping[str, int]
    startup_s: float

    def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
        first = int(now_s / SLOT_S)
        last = int((now_s + self.startup_s) / SLOT_S) + 2
        return {
            name: Choice(max([1, *sizes[first:last]]), "plan") for name, sizes in self.plan.items()
        }


def clairvoyant(
    kind: FleetKind, peak: StaticPeak, most: Mapping[str, int], startup_s: float
) -> tuple[Score, float]:
    """The cheapest plan that keeps the peak's goal, the static peak among them; GPU-hours of the
    work alone.

    Margins of the two pools are searched apart: prefill's first, beside a generous decode pool.
    """
    goal = peak.goal
    needed = needs(kind, peak.trace, startup_s, min(3 * peak.replicas, SLOTS))

    def played(prefill: float, decode: float, share: float = 0.0) -> Score:
        margins = {"prefill": prefill, "decode": decode}
        plan = {
            name: [
                min(max(1, math.ceil(margins[name] * x), math.ceil(share * static)), most[name])
                for x in values
            ]
            for name, static in peak.sizes.items()
            for values in [needed.by_pool[name]]
        }
        sizes = {
            name: max(1, max(values[: int(startup_s / SLOT_S)])) for name, values in plan.items()
        }
        scaler = Clairvoyant(plan, most, startup_s)
        return score(play(make_setup(kind, sizes, startup_s), peak.trace, scaler), kind)

    generous = MARGINS[-1]
    first = _first_of(MARGINS, lambda m: played(m, generous).attained >= goal)
    second = _first_of(MARGINS, lambda m: played(first, m).attained >= goal - 0.003)
    found = [
        played(prefill, decode)
        for prefill in MARGINS[MARGINS.index(first) : MARGINS.index(first) + 2]
        for decode in MARGINS[MARGINS.index(second) : MARGINS.index(second) + 2]
    ]
    good = [s for s in found if s.attained >= goal]
    # Where margins alone do not do (waits behind long prompts), beside a share of the static sizes.
    for share in () if good else SHARES:
        found.append(played(first, second, share))
        good = [s for s in found if s.attained >= goal]
        if good:
            break
    return min([*good, peak.score], key=lambda s: s.gpu_hours), needed.work_hours


def _first_of(values: Sequence[float], enough: Callable[[float], bool]) -> float:
    """By bisection; the last value where none is enough."""
    index = bisect_right(range(len(values) - 1), False, key=lambda i: enough(values[i]))
    return values[index]
