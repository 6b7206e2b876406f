"""What pods' engines did in each window, as the operator sees it: recorded, and played again.

A simulated pod takes a stretch of the windows that a real one went through, from a random moment
on; a slow one takes longer for each step. So the simulation's noise, batches and contexts are those
of the real run. Each pod's stretch begins at a moment of its own: what slowed the whole machine for
a while looks like one pod's slowness, so that false alarms are overstated on a busy machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import httpx
import msgspec
from tandem_operator.plan.nodes.stragglers import Measured, Memory, observe, relative, slowest
from tandem_operator.plan.scaling.window import StepSums
from tandem_operator.plan.signals import work_since
from tandem_runtime import contract
from tandem_runtime.protocol import PodState, PodWork

from benchmarks.beside import Beside

Window = tuple[StepSums, float]
"""What one pod did, and the tokens in its cache at the end."""
SLOW = "0"
"""The pod that is slow in a simulation."""
Run = Sequence[Sequence[Window]]
"""By pod, its windows in order."""


class Recorder(Beside):
    """`with Recorder(pods, window_s) as recorder:` asks the pods once a window."""

    def __init__(self, addresses: Sequence[str], window_s: float) -> None:
        super().__init__(self._record)
        self._addresses, self._window_s = addresses, window_s
        self.run: list[list[Window]] = [[] for _ in addresses]

    def _record(self) -> None:
        before = [self._work(address) for address in self._addresses]
        at_s = time.monotonic()
        while not self.stop.wait(max(0.0, at_s + self._window_s - time.monotonic())):
            at_s += self._window_s
            works = [self._work(address) for address in self._addresses]
            for run, old, new in zip(self.run, before, works, strict=True):
                run.append((work_since(new, old), float(new.kv_tokens)))
            before = works

    def _work(self, address: str) -> PodWork:
        url = f"http://{address}:{contract.HTTP_PORT}{contract.PATH_STATE}"
        state = msgspec.json.decode(httpx.get(url, timeout=30).content, type=PodState)
        assert state.work is not None
        return state.work


@dataclass(frozen=True)
class Rates:
    """Over seeds, at one threshold."""

    percent: int
    found: float
    """Share of the runs with one slow pod that found it, and not another first."""
    median_windows: int | None
    """Until it was found; None: it never was."""
    wrong: float
    """Share of those runs that found another first."""


def rates(
    run: Run, slow: float, thresholds: Sequence[int], *, windows: int, seeds: int, within: int
) -> list[Rates]:
    """Plays `seeds` runs of `within` windows with a pod slower by `slow` (0.25: 25 %)."""
    firsts = [
        _firsts(_played(run, seed, within, 1.0 + slow), thresholds, windows)
        for seed in range(seeds)
    ]
    return [_rates(percent, [first.get(percent) for first in firsts]) for percent in thresholds]


def _rates(percent: int, firsts: Sequence[tuple[str, int] | None]) -> Rates:
    after = sorted(first[1] for first in firsts if first is not None and first[0] == SLOW)
    wrong = sum(first is not None and first[0] != SLOW for first in firsts)
    middle = after[len(after) // 2] if after else None
    return Rates(percent, len(after) / len(firsts), middle, wrong / len(firsts))


def alarms_per_hour(
    run: Run,
    thresholds: Sequence[int],
    *,
    windows: int,
    seeds: int,
    within: int,
    window_s: float,
) -> dict[int, float]:
    """By threshold, false alarms an hour over as many runs in which no pod is slow."""
    hours = seeds * within * window_s / 3600.0
    firsts = [
        _firsts(_played(run, seed, within, 1.0), thresholds, windows) for seed in range(seeds)
    ]
    return {percent: sum(percent in first for first in firsts) / hours for percent in thresholds}


def _played(run: Run, seed: int, windows: int, factor: float) -> list[list[Measured]]:
    """By window, all pods; one is slower by the factor."""
    chance = random.Random(seed)
    sources = [chance.choice(run) for _ in run]
    starts = [chance.randrange(len(source)) for source in sources]
    return [
        [
            _measured(str(i), source[(start + at) % len(source)], factor if str(i) == SLOW else 1.0)
            for i, (source, start) in enumerate(zip(sources, starts, strict=True))
        ]
        for at in range(windows)
    ]


def _measured(uid: str, window: Window, factor: float) -> Measured:
    sums, kv_tokens = window
    slower = replace(sums, seconds=sums.seconds * factor)
    return Measured(uid, f"pod-{uid}", f"node-{uid}", "pool", slower, kv_tokens)


def _firsts(
    played: Sequence[Sequence[Measured]], thresholds: Sequence[int], windows: int
) -> dict[int, tuple[str, int]]:
    """By threshold that finds anybody: who is found first, and in which window."""
    memory: Memory = {}
    found: dict[int, tuple[str, int]] = {}
    for at, seen in enumerate(played, 1):
        memory = observe(memory, seen, windows)
        for group in memory.values():
            ratios = relative(group, windows)
            for percent in set(thresholds) - found.keys():
                uid = slowest(ratios, percent / 100.0)
                if uid is not None:
                    found[percent] = uid, at
        if len(found) == len(thresholds):
            break
    return found
