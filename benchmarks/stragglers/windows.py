"""What pods' engines did in each window, as the operator sees it: recorded, and played again.

A simulated pod takes a stretch of the windows that a real one went through, from a random moment
on; a slow one takes longer for each step. So the simulation's noise, batches and contexts are those
of the real run.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import httpx
import msgspec
from tandem_operator.plan.nodes.stragglers import Measured, Memory, observe, stragglers
from tandem_operator.plan.scaling.window import StepSums
from tandem_operator.plan.signals import work_since
from tandem_runtime import contract
from tandem_runtime.protocol import PodState, PodWork

Window = tuple[StepSums, float]
"""What one pod did, and the tokens in its cache at the end."""
SLOW = "0"
"""The pod that is slow in a simulation."""
Run = Sequence[Sequence[Window]]
"""By pod, its windows in order."""


class Recorder:
    """`with Recorder(pods, window_s) as recorder:` asks the pods once a window."""

    def __init__(self, addresses: Sequence[str], window_s: float) -> None:
        self._addresses, self._window_s = addresses, window_s
        self._stop = threading.Event()
        self.run: list[list[Window]] = [[] for _ in addresses]
        self._thread = threading.Thread(target=self._record)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _record(self) -> None:
        before = [self._work(address) for address in self._addresses]
        at_s = time.monotonic()
        while not self._stop.wait(max(0.0, at_s + self._window_s - time.monotonic())):
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
    """Share of the runs with one slow pod that found it, and it alone, first."""
    median_windows: int | None
    """Until it was found; None: it never was."""
    wrong: float
    """Share of those runs that found another first."""
    alarms_per_hour: float
    """In runs in which no pod is slow."""


def rates(
    run: Run, slow: float, percent: int, *, windows: int, seeds: int, window_s: float, within: int
) -> Rates:
    """Plays `seeds` runs of `within` windows with a pod slower by `slow` (0.25: 25 %), and as many
    of as many windows without."""
    after: list[int] = []
    wrong = alarms = 0
    for seed in range(seeds):
        first = _first(_played(run, seed, within, 1.0 + slow), percent, windows)
        if first is not None:
            which, window = first
            if which == SLOW:
                after.append(window)
            wrong += which != SLOW
        alarms += _first(_played(run, seed, within, 1.0), percent, windows) is not None
    hours = seeds * within * window_s / 3600.0
    middle = sorted(after)[len(after) // 2] if after else None
    return Rates(percent, len(after) / seeds, middle, wrong / seeds, alarms / hours)


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


def _first(
    played: Sequence[Sequence[Measured]], percent: int, windows: int
) -> tuple[str, int] | None:
    """Who is found first, and in which window."""
    memory: Memory = {}
    for at, seen in enumerate(played, 1):
        memory = observe(memory, seen, windows)
        found = stragglers(memory, {pod.uid: pod for pod in seen}, percent, windows)
        if found:
            return found[0].pod_uid, at
    return None
