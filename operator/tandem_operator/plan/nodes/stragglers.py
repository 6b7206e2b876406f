"""Which pod is slower than its peers for the same work.

A step's time follows from its batch: prompt tokens, streams, and the KV cache that it reads. What
each of them costs, and by which factor each pod is slower, is fitted on all pods of a group, in
turns: costs from times over the factors, factors as medians of time over cost. A pod's ratio in a
window is its time over what its own batches cost, over the median of its peers, which load moves
and one slow pod does not. A pod is a straggler once its ratio is over the policy's share on average
over the windows, in most of them, and far outside the spread (the median absolute deviation) of its
peers' averages.

Where pods measure their devices (`device.py`), that confirms it. What it does not confirm has a
cause outside the device, or is chance: such a pod has to be slow for twice as many windows.

All slow is load: it moves the median.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from tandem_operator.plan.costs import costs_of
from tandem_operator.plan.nodes.device import Probed, device_ratio
from tandem_operator.plan.nodes.view import Straggler
from tandem_operator.plan.scaling.window import StepSums

LEAST_STEPS = 20.0
"""In a window; a pod that did fewer says nothing."""
LEAST_PEERS = 3
"""Pods of a group that have to be measured, the suspect among them."""
SPREADS = 4.0
"""How far outside, in standard deviations as the median absolute deviation estimates them."""
LEAST_SPREAD = 0.01
"""Peers that agree to the last digit do so by chance."""
MOST_OF = 0.75
"""Of the windows, in which it has to be over half of the policy's share."""
NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_SUSPECTED = 2
"""Windows after which a pod may get less traffic."""
STEP_PERCENT = 10
"""A pod's annotation is not written anew for less."""
UNCONFIRMED = 2
"""Times as many windows for a pod whose device is as fast as those of its peers."""
REMEMBERED = 40
"""Windows of a pod that costs are fitted on; of a group of more than MANY pods, only the last."""
MANY = 64
ROUNDS = 4
RIDGE = 1e-6
"""Of each diagonal element: costs that windows never tell apart share the time."""


@dataclass(frozen=True)
class Measured:
    """One pod in one window."""

    uid: str
    name: str
    node: str
    group: str
    """Pods that do the same on the same: pool, revision, accelerator."""
    steps: StepSums
    """Of the window alone."""
    kv_tokens: float = 0.0
    """In its cache, at the window's end."""
    device: Probed | None = None
    """Of the window; None: not measured."""


@dataclass(frozen=True)
class Sample:
    """Of one pod in one window, for an average step."""

    taken_s: float
    work: tuple[float, ...]
    """1, prompt tokens, streams, tokens in the cache."""
    device: Probed | None = None


Group = Mapping[str, tuple[Sample, ...]]
"""By uid, the last windows, newest last."""
Memory = Mapping[str, Group]


def observe(memory: Memory, window: Iterable[Measured], windows: int) -> Memory:
    """The memory after one more window; of pods that are not in it nothing is kept."""
    pods: dict[str, list[Measured]] = {}
    for pod in window:
        if pod.steps.steps >= LEAST_STEPS and pod.steps.seconds > 0.0:
            pods.setdefault(pod.group, []).append(pod)
    after = {}
    for name, found in pods.items():
        before = memory.get(name, {})
        kept = max(UNCONFIRMED * windows, REMEMBERED if len(found) <= MANY else 0)
        after[name] = {pod.uid: (*before.get(pod.uid, ()), _sample(pod))[-kept:] for pod in found}
    return after


def _sample(pod: Measured) -> Sample:
    sums = pod.steps
    work = (1.0, sums.prompt / sums.steps, sums.streams / sums.steps, pod.kv_tokens)
    return Sample(sums.seconds / sums.steps, work, pod.device)


def relative(group: Group, windows: int) -> dict[str, tuple[float, ...]]:
    """By pod that was in all the windows: its time over what its work costs, over the median."""
    whole = {uid: samples for uid, samples in group.items() if len(samples) >= windows}
    if len(whole) < LEAST_PEERS:
        return {}
    costs = _costs(whole)
    ratios = {uid: [_ratio(s, costs) for s in samples[-windows:]] for uid, samples in whole.items()}
    middles = [median(ratio[i] for ratio in ratios.values()) for i in range(windows)]
    return {
        uid: tuple(r / m if m > 0.0 else 1.0 for r, m in zip(ratio, middles, strict=True))
        for uid, ratio in ratios.items()
    }


def _ratio(sample: Sample, costs: Sequence[float]) -> float:
    expected_s = sum(cost * amount for cost, amount in zip(costs, sample.work, strict=True))
    return sample.taken_s / expected_s if expected_s > 0.0 else 1.0


def _costs(group: Group) -> tuple[float, ...]:
    """Seconds of a step and of each prompt token, stream and cached token in it, for a pod of
    median speed."""
    factors = dict.fromkeys(group, 1.0)
    costs: tuple[float, ...] = ()
    for _ in range(ROUNDS):
        rows = [(s.work, s.taken_s / factors[uid]) for uid, found in group.items() for s in found]
        costs = _least_squares(rows)
        factors = {uid: median(_ratio(s, costs) for s in found) for uid, found in group.items()}
        middle = median(factors.values())
        factors = {uid: factor / middle for uid, factor in factors.items()}
    return costs


def _least_squares(rows: Sequence[tuple[tuple[float, ...], float]]) -> tuple[float, ...]:
    """The costs, none below 0, that leave the least open relative to each time: noise is a share
    of it."""
    n = len(rows[0][0])
    matrix = [[0.0] * n for _ in range(n)]
    right = [0.0] * n
    for work, taken_s in rows:
        for i in range(n):
            share = work[i] / taken_s
            right[i] += share
            for j in range(n):
                matrix[i][j] += share * work[j] / taken_s
    return tuple(costs_of(matrix, right, (0.0,) * n, RIDGE) or (0.0,) * n)


def stragglers(
    memory: Memory, pods: Mapping[str, Measured], percent: int, windows: int
) -> tuple[Straggler, ...]:
    """The slowest pod of each group, if it is a straggler: one at a time."""
    found = []
    for group in memory.values():
        straggler = _straggler(group, pods, percent / 100.0, windows)
        if straggler is not None:
            found.append(straggler)
    return tuple(sorted(found, key=lambda s: s.pod_uid))


def _straggler(
    group: Group, pods: Mapping[str, Measured], share: float, windows: int
) -> Straggler | None:
    ratios = relative(group, windows)
    uid = slowest(ratios, share)
    if uid is None or uid not in pods:
        return None
    devices = {pod: [s.device for s in samples[-windows:]] for pod, samples in group.items()}
    device = device_ratio(devices, uid, LEAST_PEERS)
    if device is not None and device.least > 1.0 / (1.0 + share / 2):
        windows *= UNCONFIRMED
        ratios = relative(group, windows)
        if slowest(ratios, share) != uid:
            return None
    told = [f"{fmean(ratios[uid]):.2f}x its peers for {windows} windows"]
    if device is not None:
        told.append(device.sentence)
    return Straggler(uid, f"{pods[uid].name} on {pods[uid].node}: {', '.join(told)}")


def suspected(memory: Memory, percent: int, windows: int) -> dict[str, int]:
    """By uid, by how many percent a pod seems to be slower: the slowest of each group, by the same
    rule over half of the windows. It only gets less traffic, which is soon undone."""
    found = {}
    for group in memory.values():
        ratios = relative(group, max(LEAST_SUSPECTED, windows // 2))
        uid = slowest(ratios, percent / 100.0)
        if uid is not None:
            slower = 100.0 * (fmean(ratios[uid]) - 1.0)
            found[uid] = max(STEP_PERCENT, round(slower / STEP_PERCENT) * STEP_PERCENT)
    return found


def slowest(ratios: Mapping[str, tuple[float, ...]], share: float) -> str | None:
    """The pod that is slower by at least the share, in most windows and far outside the others."""
    means = {uid: fmean(ratio) for uid, ratio in ratios.items()}
    uid = max(means, key=lambda uid: (means[uid], uid), default=None)
    if uid is None:
        return None
    middle = median(means.values())
    spread = NORMAL * median(abs(mean - middle) for mean in means.values())
    outside = means[uid] - middle >= SPREADS * max(spread, LEAST_SPREAD)
    slow = sum(ratio >= 1.0 + share / 2 for ratio in ratios[uid])
    often = slow >= MOST_OF * len(ratios[uid])
    return uid if outside and often and means[uid] >= 1.0 + share else None
