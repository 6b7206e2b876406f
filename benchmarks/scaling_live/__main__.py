"""A sixfold load on a live fleet: each pool grows, the objectives hold again, and nothing fails.

    .venv/bin/python -m benchmarks.scaling_live [--quick]

A local cluster, a real Prometheus that the operator's settings name, and a fleet of paced pods (no
accelerator is there; see docs/how-to) whose prefill and decode pools scale from zero to eight.
Requests arrive by chance, at one rate. Then

1. the rate is sixfold, and 20 s later the operator's pod is deleted;
2. it is as before, until both pools have at most a pod more than before (the law remembers bursts);
3. Prometheus is stopped: the sizes have to stay, and the fleet has to say so; it is started again;
4. nobody asks, until both pools are at zero; then one request comes.

The limit that recovery is held against is the pods' own start-up, measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table
from tandem.cluster.paths import cache_home
from tandem_runtime.checkpoint.tiny import write_tiny
from tandem_runtime.contract import Role

from benchmarks.fleet import cluster, note
from benchmarks.prometheus import server as prometheus
from benchmarks.prometheus.server import PrometheusServer
from benchmarks.report import Target, finish
from benchmarks.scaling_live.load import Answer, OpenLoad, recovered_after_s, share_within
from benchmarks.scaling_live.scene import (
    MAX_RUNNING,
    PACE,
    TPOT_S,
    TTFT_S,
    Scene,
    Watcher,
    busier_than_least,
    start_prometheus,
)

BASE_PER_S: Final = 0.5
FACTOR: Final = 6
RESTART_AFTER_S: Final = 20.0
SHARE: Final = 0.9
"""Of a bucket's answers, within both targets: then the objectives hold."""
BUCKET_S: Final = 10.0
PATIENCE_S: Final = 420.0
HELD_S: Final = 20.0


@dataclass(frozen=True)
class Timing:
    """How long the rates last, in seconds."""

    base_s: float
    step_s: float


FULL: Final = Timing(base_s=90.0, step_s=240.0)
QUICK: Final = Timing(base_s=45.0, step_s=90.0)


@dataclass
class Story:
    """What happened, on the monotonic clock; None: not in time."""

    step_begun_s: float = 0.0
    step_ended_s: float = 0.0
    before: dict[str, int] = field(default_factory=dict)
    back_after_s: float | None = None
    held: bool = False
    said: str = ""
    heard_again_after_s: float | None = None
    asleep_after_s: float | None = None
    woken: Answer | None = None


def play(
    scene: Scene, load: OpenLoad, watcher: Watcher, server: PrometheusServer, timing: Timing
) -> Story:
    """The four parts of the module's text, but for the last request."""
    story = Story()
    note("the usual rate")
    load.per_s = BASE_PER_S
    scene.wait(lambda: bool(watcher.looks) and min(watcher.looks[-1].ready.values()) > 0, 300.0)
    time.sleep(timing.base_s)
    story.before = scene.sizes()
    note(f"sizes {story.before}; the sixfold rate")
    story.step_begun_s = time.monotonic()
    load.per_s = FACTOR * BASE_PER_S
    time.sleep(RESTART_AFTER_S)
    scene.restart_operator()
    time.sleep(timing.step_s - RESTART_AFTER_S)
    story.step_ended_s = time.monotonic()
    note(f"sizes {scene.sizes()}; the usual rate again")
    load.per_s = BASE_PER_S
    story.back_after_s = scene.wait(lambda: _fits(scene.sizes(), story.before), PATIENCE_S)
    _stop_prometheus(scene, server, story)
    note("nobody asks any more")
    load.per_s = 0.0
    story.asleep_after_s = scene.wait(
        lambda: not any(scene.sizes().values()) and not any(watcher.looks[-1].ready.values()),
        PATIENCE_S,
    )
    return story


def _fits(sizes: dict[str, int], before: dict[str, int]) -> bool:
    return all(sizes[role] <= size + 1 for role, size in before.items())


def _stop_prometheus(scene: Scene, server: PrometheusServer, story: Story) -> None:
    note("Prometheus is stopped")
    server.stop()
    scene.wait(lambda: scene.scaling()[0] == "False", 120.0)
    story.said = ": ".join(scene.scaling())
    held = scene.sizes()
    time.sleep(HELD_S)
    story.held = scene.sizes() == held
    server.start()
    story.heard_again_after_s = scene.wait(lambda: scene.scaling()[0] == "True", 120.0)


async def wake(load: OpenLoad) -> Answer:
    """One request to a fleet that sleeps."""
    async with httpx.AsyncClient(timeout=600.0) as http:
        return await load.ask(http)


def targets_of(
    story: Story, watcher: Watcher, answers: list[Answer], startup_s: float
) -> list[Target]:
    """The claims."""
    step = [a for a in answers if story.step_begun_s <= a.arrived_s < story.step_ended_s]
    late = [a for a in step if a.arrived_s >= (story.step_begun_s + story.step_ended_s) / 2]
    recovered_s = recovered_after_s(
        answers,
        story.step_begun_s,
        story.step_ended_s,
        ttft_s=TTFT_S,
        tpot_s=TPOT_S,
        share=SHARE,
        bucket_s=BUCKET_S,
    )
    during = [look for look in watcher.looks if look.at_s > story.step_begun_s]
    prefill = max(look.sizes.get(Role.PREFILL, 0) for look in during)
    decode = max(look.sizes.get(Role.DECODE, 0) for look in during)
    busier = busier_than_least(watcher.looks)
    quiet = story.held and story.said.startswith("False")
    woken_s = story.woken.ttft_s if story.woken and not story.woken.error else 1e6
    return [
        Target("requests that failed", sum(bool(a.error) for a in answers), 0),
        Target("prefill pods at most, sixfold load", prefill, 2, "at least"),
        Target("decode pods at most, sixfold load", decode, 2, "at least"),
        Target(
            "second half of the sixfold load: share within both objectives",
            round(share_within(late, TTFT_S, TPOT_S), 3),
            SHARE,
            "at least",
        ),
        Target("seconds until the objectives held again", round(recovered_s, 1), None),
        Target("the same, over a pod's start-up + 20 s", recovered_s / (startup_s + 20.0), None),
        Target(
            "seconds until at most a pod more than before",
            _or_never(story.back_after_s),
            PATIENCE_S,
        ),
        Target("streams more than the idlest pod had, of one that left", max(busier, default=0), 1),
        Target("sizes held without Prometheus, and said so", float(quiet), 1, "at least"),
        Target("seconds until both pools slept", _or_never(story.asleep_after_s), PATIENCE_S),
        Target("first token from zero, over a pod's start-up", woken_s / startup_s, 3),
    ]


def _or_never(seconds: float | None) -> float:
    return 1e6 if seconds is None else round(seconds, 1)


def show(watcher: Watcher, answers: list[Answer], story: Story) -> None:
    """A row for every 15 s."""
    table = Table(title=f"pods paced as {PACE}, {MAX_RUNNING} streams each; a sixfold load")
    for heading in ("from, s", "requests", "prefill", "decode", "TTFT p95, ms", "TPOT p95, ms"):
        table.add_column(heading, justify="right")
    begun_s = watcher.looks[0].at_s
    for at_s in range(0, int(watcher.looks[-1].at_s - begun_s), 15):
        low_s, high_s = begun_s + at_s, begun_s + at_s + 15
        look = next(look for look in watcher.looks if look.at_s >= low_s)
        here = [a for a in answers if low_s <= a.arrived_s < high_s and not a.error]
        table.add_row(
            f"{low_s - story.step_begun_s:.0f}",
            str(len(here)),
            f"{look.ready['prefill']} of {look.sizes.get('prefill', 0)}",
            f"{look.ready['decode']} of {look.sizes.get('decode', 0)}",
            _p95_ms([a.ttft_s for a in here]),
            _p95_ms([a.tpot_s for a in here]),
        )
    Console(width=100).print(table)


def _p95_ms(values: list[float]) -> str:
    return f"{1000 * sorted(values)[int(0.95 * len(values))]:.0f}" if values else "-"


def results(story: Story, watcher: Watcher, answers: list[Answer]) -> dict[str, Any]:
    """For the JSON."""
    begun_s = story.step_begun_s
    return {
        "pace": PACE,
        "streams_of_a_pod": MAX_RUNNING,
        "requests_per_s": [BASE_PER_S, FACTOR * BASE_PER_S],
        "objectives_s": {"ttft": TTFT_S, "tpot": TPOT_S},
        "load_average": round(os.getloadavg()[2], 1),
        "requests": len(answers),
        "errors": sorted({a.error for a in answers if a.error})[:3],
        "sizes_before": story.before,
        "without_prometheus": story.said,
        "scaling_active_again_after_s": story.heard_again_after_s,
        "woken": asdict(story.woken) if story.woken else None,
        "busier_than_the_idlest_pod": busier_than_least(watcher.looks),
        "looks": [
            [round(look.at_s - begun_s), look.sizes, look.ready] for look in watcher.looks[::5]
        ],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short parts")
    options = parser.parse_args()
    timing = QUICK if options.quick else FULL
    binary = prometheus.find(note)
    # Containers see it; /tmp and the cluster's own folder they do not.
    seen = tempfile.TemporaryDirectory(dir=cache_home().parent)
    with seen as folder, tempfile.TemporaryDirectory() as data, cluster("scaling") as running:
        write_tiny(Path(folder))
        scene, server = Scene(running), start_prometheus(binary, Path(data))
        try:
            scene.ask_prometheus(server.url)
            url = scene.serve(f"file://{folder}")
            with Watcher(scene, server) as watcher, OpenLoad(url, "chat") as load:
                story = play(scene, load, watcher, server, timing)
                note("one request wakes it")
                story.woken = asyncio.run(wake(load))
        finally:
            server.stop()
    startups_s = {k: v for look in watcher.looks for k, v in look.startups_s.items()}
    startup_s = median(startups_s.values())
    answers = sorted(load.answers, key=lambda answer: answer.arrived_s)
    show(watcher, answers, story)
    print(f"start-up of a pod {startup_s:.0f} s; without Prometheus: {story.said}")
    targets = targets_of(story, watcher, answers, startup_s)
    finish(
        "scaling_live",
        targets,
        {"quick": options.quick, "startup_s": startup_s, **results(story, watcher, answers)},
    )


if __name__ == "__main__":
    main()
