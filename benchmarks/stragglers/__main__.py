"""Slow pods among paced ones: how soon they are found, and what pulling them out is worth.

    .venv/bin/python -m benchmarks.stragglers [--quick] [--slow 25 --slow 50] [--percent 7]

A local cluster with a fleet of six paced pods (no accelerator is there; see docs/how-to) under a
mixed load. First all are well: their windows are recorded. Then one after the other is slowed by
some percent, outside its engine (the node agent stops its process for a share of the time), and the
operator has to find it and replace it. At last all are slowed alike, and nothing may happen.

The recorded windows are then played many times in a simulation, with and without a slow pod: how
often it is found and how often somebody else is, by threshold.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from tandem.cluster.paths import cache_home
from tandem_runtime.checkpoint.tiny import write_tiny

from benchmarks.fleet import cluster, note, serve
from benchmarks.report import Target, finish
from benchmarks.stragglers.load import Clients, tpot_p99_ms
from benchmarks.stragglers.scene import Pulled, Scene
from benchmarks.stragglers.windows import Rates, Recorder, Run, alarms_per_hour, rates

PODS: Final = 6
NODES: Final = 7
"""One to spare: a replacement does not go where its predecessor was slow."""
PACE: Final = "mi300x:llama-3.1-70b"
"""Of long steps: several pods, their load and everything else share this machine's cores."""
CLIENTS: Final = 12
WINDOW_S: Final = 5
WINDOWS: Final = 6
PERCENT: Final = 10
SLOW: Final = (10, 15, 25, 50)
SETTLED_S: Final = 10.0
PLAYED_WINDOWS: Final = 600 // WINDOW_S
THRESHOLDS: Final = (5, 7, 10, 15, 20, 30)


@dataclass(frozen=True)
class Timing:
    """How long each part lasts, in seconds, and how many seeds are played."""

    well_s: float
    find_s: float
    after_s: float
    seeds: int
    percent: int = PERCENT
    """From which on the policy calls a pod slow."""


FULL: Final = Timing(well_s=300.0, find_s=180.0, after_s=60.0, seeds=100)
QUICK: Final = Timing(well_s=90.0, find_s=90.0, after_s=20.0, seeds=20)


@dataclass(frozen=True)
class Row:
    """One pod, slowed."""

    percent: int
    slowed: str
    pulled: Pulled
    found_after_s: float | None
    gone_after_s: float | None
    p99_slow_ms: float | None
    p99_after_ms: float | None

    @property
    def right(self) -> bool:
        return self.pulled.pod == self.slowed

    def as_json(self) -> dict[str, Any]:
        return {
            "percent": self.percent,
            "found_after_s": self.found_after_s,
            "replaced_after_s": self.gone_after_s,
            "right_pod": self.right,
            "evidence": self.pulled.evidence,
            "tpot_p99_slow_ms": self.p99_slow_ms,
            "tpot_p99_after_ms": self.p99_after_ms,
        }


def one_slow(scene: Scene, clients: Clients, percent: int, timing: Timing) -> Row:
    """Slows the first pod, and waits for what becomes of it."""
    name, _ = scene.pods()[0]
    scene.watch(timing.percent, WINDOWS, WINDOW_S)
    begun_s = time.monotonic()
    scene.slow([name], percent)
    pulled = scene.pulled(timing.find_s)
    until_s = pulled.found_s or time.monotonic()
    if pulled.gone_s is None and name in dict(scene.pods()):
        scene.slow([name], 0)
    well_s = time.monotonic()
    time.sleep(timing.after_s)
    scene.unwatch()
    return Row(
        percent,
        name,
        pulled,
        None if pulled.found_s is None else round(pulled.found_s - begun_s, 1),
        None if pulled.gone_s is None else round(pulled.gone_s - begun_s, 1),
        tpot_p99_ms(clients.answers, begun_s, until_s),
        tpot_p99_ms(clients.answers, well_s, math.inf),
    )


def all_slow(scene: Scene, timing: Timing) -> list[str]:
    """Slows every pod alike; the evidence of what was done all the same."""
    scene.watch(timing.percent, WINDOWS, WINDOW_S)
    scene.slow([name for name, _ in scene.pods()], 25)
    pulled = scene.pulled(timing.find_s)
    scene.unwatch()
    return [pulled.evidence] if pulled.found_s is not None else []


def show_rows(rows: Sequence[Row]) -> None:
    """The table of the live runs."""
    table = Table(title=f"{PODS} pods paced as {PACE}, {CLIENTS} clients, one slowed")
    for heading in ("slower by", "found after, s", "replaced after, s", "right one"):
        table.add_column(heading, justify="right")
    table.add_column("TPOT p99 slow, ms", justify="right")
    table.add_column("after, ms", justify="right")
    table.add_column("evidence")
    for row in rows:
        table.add_row(
            f"{row.percent} %",
            _text(row.found_after_s),
            _text(row.gone_after_s),
            "-" if row.found_after_s is None else str(row.right),
            str(row.p99_slow_ms),
            str(row.p99_after_ms),
            row.pulled.evidence,
        )
    Console(width=170).print(table)


def _text(seconds: float | None) -> str:
    return "not found" if seconds is None else f"{seconds:.0f}"


def show_rates(found: dict[int, list[Rates]], alarms: dict[int, float]) -> None:
    """The table of the simulation."""
    table = Table(title="simulated with the noise of the paced run, ten minutes each")
    for heading in ("slower by", "threshold", "found", "windows", "wrong one", "alarms an hour"):
        table.add_column(heading, justify="right")
    for slow, of in found.items():
        for rate in of:
            table.add_row(
                f"{slow} %",
                f"{rate.percent} %",
                f"{rate.found:.2f}",
                str(rate.median_windows),
                f"{rate.wrong:.2f}",
                f"{alarms[rate.percent]:.2f}",
            )
    Console(width=100).print(table)


def play(run: Run, slow: Sequence[int], seeds: int) -> dict[int, list[Rates]]:
    """By slowness, the rates at each threshold."""
    return {
        percent: rates(
            run, percent / 100, THRESHOLDS, windows=WINDOWS, seeds=seeds, within=PLAYED_WINDOWS
        )
        for percent in slow
    }


def targets_of(
    rows: Sequence[Row],
    equal: Sequence[str],
    played: dict[int, list[Rates]],
    alarms: dict[int, float],
    errors: int,
    threshold: int,
) -> list[Target]:
    """The claims."""
    found = [
        Target("paced: answers that failed", errors, 0),
        Target("paced: another pod than the slow one was pulled out", sum(
            row.pulled.found_s is not None and not row.right for row in rows), 0),
        Target("paced: pods pulled out while all were slow alike", len(equal), 0),
    ]  # fmt: skip
    for row in rows:
        after_s = math.inf if row.found_after_s is None else row.found_after_s
        bound = None if row.percent <= threshold else 2.0 * WINDOWS * WINDOW_S
        if math.isfinite(after_s) or bound is not None:
            name = f"paced: seconds until {row.percent} % slower was found"
            found.append(Target(name, min(after_s, 1e6), bound))
    for percent, of in played.items():
        rate = next(rate for rate in of if rate.percent == threshold)
        bound = None if percent <= threshold else 0.95
        name = f"simulated: share of {percent} % slower pods found"
        found.append(Target(name, rate.found, bound, "at least"))
    found.append(Target("simulated: false alarms an hour", round(alarms[threshold], 3), 0.1))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short parts, few seeds")
    parser.add_argument("--slow", type=int, action="append", help="percent; repeatable")
    parser.add_argument(
        "--percent", type=int, choices=THRESHOLDS, default=PERCENT, help="the policy's"
    )
    options = parser.parse_args()
    timing = replace(QUICK if options.quick else FULL, percent=options.percent)
    slow = options.slow or ([25] if options.quick else SLOW)
    rows: list[Row] = []
    # Containers see it; /tmp and the cluster's own folder they do not.
    seen = tempfile.TemporaryDirectory(dir=cache_home().parent)
    with cluster("stragglers", NODES) as running, seen as folder:
        write_tiny(Path(folder))
        fleet = serve(
            running,
            "paced",
            prefill=None,
            decode=PODS,
            dtype="bfloat16",
            uri=f"file://{folder}",
            arguments=["--pace", PACE],
        )
        scene = Scene(fleet, PODS)
        with Clients(fleet.url, fleet.model, CLIENTS) as clients:
            time.sleep(SETTLED_S)
            note("all pods are well")
            cpu_s, begun_s = scene.cpu_s(), time.monotonic()
            with Recorder([address for _, address in scene.pods()], WINDOW_S) as recorder:
                time.sleep(timing.well_s)
            lasted_s = time.monotonic() - begun_s
            cores = (scene.cpu_s() - cpu_s) / lasted_s
            well_ms = tpot_p99_ms(clients.answers, begun_s, begun_s + lasted_s)
            for percent in slow:
                note(f"one pod is slowed by {percent} %")
                rows.append(one_slow(scene, clients, percent, timing))
                note(str(rows[-1].as_json()))
                scene.wait(scene.steady, timing.find_s)
            note("all pods are slowed by 25 %")
            equal = all_slow(scene, timing)
        errors = clients.errors
    note("playing the recorded windows")
    played = play(recorder.run, slow, timing.seeds)
    alarms = alarms_per_hour(
        recorder.run,
        THRESHOLDS,
        windows=WINDOWS,
        seeds=timing.seeds,
        within=PLAYED_WINDOWS,
        window_s=WINDOW_S,
    )
    show_rows(rows)
    show_rates(played, alarms)
    print(f"six paced pods took {cores:.2f} cores; TPOT p99 with none slow {well_ms} ms")
    finish(
        "stragglers",
        targets_of(rows, equal, played, alarms, len(errors), timing.percent),
        {
            "quick": options.quick,
            "load_average": round(os.getloadavg()[2], 1),
            "pace": PACE,
            "window_s": WINDOW_S,
            "windows": WINDOWS,
            "percent": timing.percent,
            "cores_of_the_pods": round(cores, 2),
            "tpot_p99_well_ms": well_ms,
            "requests": len(clients.answers),
            "errors": sorted(set(errors))[:3],
            "paced": [row.as_json() for row in rows],
            "equally_slow": equal,
            "simulated_alarms_per_hour": alarms,
            "simulated": {str(p): [asdict(rate) for rate in of] for p, of in played.items()},
        },
    )


if __name__ == "__main__":
    main()
