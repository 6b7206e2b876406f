"""From scores to claims: losses, frontiers, and bounds over the seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.autoscaling.setup import Score

LEVELS: Final = (0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995)
"""Attainments at which frontiers are compared."""
STUDENT: Final = (math.inf, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""Student's t at 95 %, one-sided, by degrees of freedom."""


@dataclass(frozen=True)
class Result:
    """A policy at one setting on one trace at one seed."""

    trace: str
    seed: int
    policy: str
    setting: float
    score: Score
    loss: float
    ratio: float
    """GPU-hours over the clairvoyant plan's."""


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def best_settings(results: Sequence[Result]) -> dict[str, float]:
    """Of each policy the one setting with the least loss over all traces and seeds."""
    losses: dict[tuple[str, float], list[float]] = defaultdict(list)
    for result in results:
        losses[result.policy, result.setting].append(result.loss)
    best: dict[str, float] = {}
    for policy, setting in sorted(losses, key=lambda key: geometric_mean(losses[key])):
        best.setdefault(policy, setting)
    return best


def mean_losses(results: Sequence[Result], settings: Mapping[str, float]) -> dict[str, float]:
    """Of each policy at its setting."""
    return {
        policy: geometric_mean(r.loss for r in results if (r.policy, r.setting) == (policy, at))
        for policy, at in settings.items()
    }


def trace_losses(results: Sequence[Result], policy: str, setting: float) -> dict[str, float]:
    """By trace, over its seeds."""
    losses: dict[str, list[float]] = defaultdict(list)
    for r in results:
        if (r.policy, r.setting) == (policy, setting):
            losses[r.trace].append(r.loss)
    return {trace: geometric_mean(values) for trace, values in losses.items()}


def ratio_by_seed(
    results: Sequence[Result], ours: tuple[str, float], rival: tuple[str, float]
) -> list[float]:
    """Our loss over the rival's, the geometric mean of the traces, for each seed."""
    losses = {(r.trace, r.seed, r.policy, r.setting): r.loss for r in results}
    seeds = sorted({r.seed for r in results})
    traces = sorted({r.trace for r in results})
    return [
        geometric_mean(losses[(t, seed, *ours)] / losses[(t, seed, *rival)] for t in traces)
        for seed in seeds
    ]


def upper_bound(values: Sequence[float]) -> float:
    """Of the mean of positive values, at 95 %, on the logarithm; infinite for a single one."""
    logs = [math.log(value) for value in values]
    free = len(logs) - 1
    if free < 1:
        return math.inf
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / free)
    return math.exp(mean + STUDENT[min(free, len(STUDENT) - 1)] * deviation / math.sqrt(len(logs)))


def hours_at(results: Iterable[Result], level: float) -> float:
    """The least GPU-hours, over the clairvoyant plan's, with so much attained; infinite: never."""
    return min((r.ratio for r in results if r.score.attained >= level), default=math.inf)


def regret(results: Sequence[Result], policy: str) -> dict[str, float]:
    """By trace, GPU-hours at equal attainment over those of the best policy and setting chosen for
    that trace and seed; levels that the policy never reaches are infinite, ones that nobody does
    are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for trace, seed in sorted({(r.trace, r.seed) for r in results}):
        here = [r for r in results if (r.trace, r.seed) == (trace, seed)]
        mine = [r for r in here if r.policy == policy]
        for level in LEVELS:
            if math.isfinite(best := hours_at(here, level)):
                found[trace].append(hours_at(mine, level) / best)
    return {trace: geometric_mean(values) for trace, values in found.items()}


def hypervolume(results: Sequence[Result], policy: str, most_ratio: float) -> float:
    """Mean over LEVELS of the share of `most_ratio` that the policy's frontier saves."""
    mine = [r for r in results if r.policy == policy]
    return sum(max(0.0, 1.0 - hours_at(mine, level) / most_ratio) for level in LEVELS) / len(LEVELS)
