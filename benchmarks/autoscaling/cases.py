"""One trace at one seed: made larger, its static peak, the clairvoyant plan, and scores on it.

What was computed is kept outside the tree, by everything that it depends on: the trace's content,
the set-up and the sources. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import tandem_operator.plan.scaling
import tandem_runtime.roofline
from tandem.simulate.scalers import Fixed, Scaler
from tandem.traces.read import read_trace
from tandem.traces.trace import Trace, TraceError, cut

import benchmarks.autoscaling
from benchmarks.autoscaling.reference import StaticPeak, clairvoyant, scaled_to_peak, static_peak
from benchmarks.autoscaling.resample import resample
from benchmarks.autoscaling.rivals import Bounds
from benchmarks.autoscaling.setup import FLEETS, FleetKind, Score, make_setup, play, score

CACHE: Final = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "autoscaling"
)
LEAST_S: Final = 600.0
_WORLD: Final = ("compiled", "fast.py", "setup.py", "resample.py", "reference.py")


@dataclass(frozen=True)
class Plan:
    """What is the same for all cases of a run."""

    fleet: str = "8b"
    peak_replicas: int = 24
    minutes: float = 60.0
    startup_s: float = 100.0
    kernel_s: float = 10.0
    headroom: float = 1.25
    slowdown: float = 1.0
    """Of the engines, against what rivals' profiles and the static sizes were made for."""


@dataclass(frozen=True)
class Case:
    """A trace at a seed; the factor is that of seed 0."""

    path: Path
    seed: int
    plan: Plan

    @property
    def trace_name(self) -> str:
        return self.path.name.partition(".")[0]

    @property
    def kind(self) -> FleetKind:
        return replace(FLEETS[self.plan.fleet], slowdown=self.plan.slowdown)

    @cached_property
    def found(self) -> Mapping[str, Any]:
        """Factor, static sizes, static and clairvoyant scores, hours of the work alone."""
        return self._kept("case", _sources(_WORLD), self._find)

    @property
    def sizes(self) -> Mapping[str, int]:
        sizes: Mapping[str, int] = self.found["sizes"]
        return sizes

    @property
    def clairvoyant(self) -> Score:
        return Score(**self.found["clairvoyant"])

    @property
    def static(self) -> Score:
        return Score(**self.found["static"])

    @property
    def bounds(self) -> dict[str, Bounds]:
        return {n: Bounds(1, math.ceil(self.plan.headroom * s)) for n, s in self.sizes.items()}

    @property
    def first_sizes(self) -> dict[str, int]:
        return {name: math.ceil(size / 2) for name, size in self.sizes.items()}

    @cached_property
    def trace(self) -> Trace:
        """Resampled."""
        return resample(self._origin, self.found["factor"], self.seed, self.plan.kernel_s)

    def score(self, label: str, make: Callable[[Case], Scaler], *, law: bool) -> Score:
        """Of a policy; `label` names it and its setting."""

        def run() -> dict[str, Any]:
            setup = make_setup(self.kind, self.first_sizes, self.plan.startup_s)
            return asdict(score(play(setup, self.trace, make(self)), self.kind))

        sources = _sources((*_WORLD, "rivals.py", "policies.py")) + (_law() if law else "")
        return Score(**self._kept(label, sources, run))

    @cached_property
    def _origin(self) -> Trace:
        """Raises TraceError: nothing would be left after the first 300 s."""
        minutes = self.plan.minutes
        trace = cut(read_trace(self.path), length_s=60.0 * minutes)
        if trace.duration_s < LEAST_S:
            raise TraceError(
                f"{trace.name} has {trace.duration_s:.0f} s in its first {minutes:g} minutes: at "
                f"least {LEAST_S:g} s are needed, of which 300 s are not counted"
            )
        return trace

    def _find(self) -> dict[str, Any]:
        peak = self._peak()
        most = {name: math.ceil(self.plan.headroom * size) for name, size in peak.sizes.items()}
        static = peak.score
        if self.plan.slowdown != 1.0:
            setup = make_setup(self.kind, peak.sizes, self.plan.startup_s)
            static = score(play(setup, peak.trace, Fixed()), self.kind)
        best, work_hours = clairvoyant(
            self.kind, replace(peak, score=static), most, self.plan.startup_s
        )
        return {
            "factor": peak.factor, "sizes": dict(peak.sizes), "requests": len(peak.trace),
            "static": asdict(static), "clairvoyant": asdict(best), "work_hours": work_hours,
        }  # fmt: skip

    def _peak(self) -> StaticPeak:
        plan, kind = self.plan, FLEETS[self.plan.fleet]
        if self.seed == 0:
            return scaled_to_peak(
                kind, self._origin, plan.peak_replicas, plan.startup_s, plan.kernel_s
            )
        factor = replace(self, seed=0).found["factor"]
        trace = resample(self._origin, factor, self.seed, plan.kernel_s)
        return static_peak(kind, trace, factor, plan.startup_s, plan.peak_replicas)

    def _kept(self, what: str, sources: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = [what, sources, _digest(self.path), self.seed, asdict(self.plan)]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        path = CACHE / f"{name[:32]}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        made = make()
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(made))
        part.replace(path)
        return made


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _sources(names: tuple[str, ...]) -> str:
    """Of the benchmark and the planner's arithmetic."""
    here = Path(benchmarks.autoscaling.__path__[0])
    return _of([here / name for name in names] + [Path(tandem_runtime.roofline.__path__[0])])


@cache
def _law() -> str:
    return _of([Path(tandem_operator.plan.scaling.__path__[0])])


def _of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
