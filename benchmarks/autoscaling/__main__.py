"""Attainment against GPU-hours: the operator's law and its rivals in one simulator.

    .venv/bin/python -m benchmarks.autoscaling --trace FILE [FILE ...]

Each trace is multiplied until the least static sizes that keep 99 % of requests (both targets) are
about --peak-replicas; its first --minutes are replayed. Targets: TTFT max(1 s, 3 x the prompt
alone), TPOT 25 ms (8b) or 40 ms (70b) for answers of 16 tokens and more; a request waits 30 s at
most, and one that is given up is missed. Every policy begins at half the static sizes, may use
--headroom times them, and is counted after 300 s; GPU-hours run from creation to deletion.

    loss = GPU-hours / the clairvoyant plan's + 0.1 for each point of attainment under 99 %

Rivals are searched on the grid that is printed, and reported at the one setting that is best over
all traces given; ours is reported at its default. What was computed is kept in ~/.cache, so a run
that is repeated with more seeds or traces computes only those. The published set-up is the default
with --seeds 5, for each --fleet.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tandem.simulate.run import SimulationError
from tandem.traces.trace import TraceError

from benchmarks.autoscaling.cases import Case, Plan
from benchmarks.autoscaling.claims import (
    Result,
    best_settings,
    geometric_mean,
    hypervolume,
    mean_losses,
    ratio_by_seed,
    regret,
    trace_losses,
    upper_bound,
)
from benchmarks.autoscaling.policies import DEFAULT, OURS, POLICIES
from benchmarks.autoscaling.setup import FLEETS, Score
from benchmarks.report import Target, finish

STATIC = "static peak"
CLAIRVOYANT = "clairvoyant"
HINDSIGHT = (STATIC, CLAIRVOYANT)
MOST_EVENTS_PER_H = 20
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 130)


def results_of(case: Case, policies: Sequence[str]) -> list[Result]:
    """The policies on a case, beside what only hindsight knows."""
    least = case.clairvoyant.gpu_hours

    def result(policy: str, setting: float, found: Score) -> Result:
        loss, ratio = found.loss(least), found.gpu_hours / least
        return Result(case.trace_name, case.seed, policy, setting, found, loss, ratio)

    results = [result(CLAIRVOYANT, 0.0, case.clairvoyant), result(STATIC, 0.0, case.static)]
    for name in policies:
        make, grid = POLICIES[name]
        for setting in grid:
            label = f"{name} {setting:g}"
            found = case.score(label, lambda c, m=make, s=setting: m(c, s), law=name == OURS)  # type: ignore[misc]
            results.append(result(name, setting, found))
    return results


def told(case: Case) -> str:
    found = case.found
    least, work = case.clairvoyant, found["work_hours"]
    return (
        f"{case.trace_name}, seed {case.seed}: {found['requests']:,} requests "
        f"({found['factor']:.2f}x), static peak {dict(case.sizes)}; clairvoyant "
        f"{least.gpu_hours:.2f} GPU-hours at {least.attained:.2%}, "
        f"{least.gpu_hours / work:.2f}x its work alone"
    )


def show(results: Sequence[Result], settings: dict[str, float]) -> None:
    """A table for each trace: the means of its seeds, at the settings that count."""
    for trace in dict.fromkeys(r.trace for r in results):
        table = Table(title=trace, title_justify="left")
        for heading in ("policy", "setting", "within targets", "x clairvoyant", "loss",
                        "scale events/h"):  # fmt: skip
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        for policy, setting in settings.items():
            rows = [
                r for r in results if (r.trace, r.policy, r.setting) == (trace, policy, setting)
            ]
            count = len(rows)
            table.add_row(
                policy, "" if policy in HINDSIGHT else f"{setting:g}",
                f"{sum(r.score.attained for r in rows) / count:.2%}",
                f"{geometric_mean(r.ratio for r in rows):.2f}",
                f"{geometric_mean(r.loss for r in rows):.2f}",
                f"{max(r.score.scale_events_per_h for r in rows):.0f}",
            )  # fmt: skip
        console.print(table)
    for policy, (_, grid) in POLICIES.items():
        if policy != OURS and settings.get(policy) in (grid[0], grid[-1]):
            console.print(f"{policy}: its best setting is at the grid's edge; a wider one may help")
    for policy, loss in sorted(mean_losses(results, settings).items(), key=lambda item: item[1]):
        console.print(f"{policy}: geometric mean of the loss {loss:.2f}")


def claims(results: Sequence[Result], settings: dict[str, float]) -> list[Target]:
    """What the issue of this benchmark is: ours against rivals, each with its bound."""
    ours = [r for r in results if (r.policy, r.setting) == (OURS, settings[OURS])]
    targets = [
        Target("scale events per hour and pool", max(r.score.scale_events_per_h for r in ours),
               MOST_EVENTS_PER_H),
    ]  # fmt: skip
    rivals = {p: s for p, s in settings.items() if p not in (OURS, *HINDSIGHT)}
    if not rivals:
        return targets
    losses = mean_losses(results, settings)
    rival = min(rivals, key=lambda name: losses[name])
    ratios = ratio_by_seed(results, (OURS, settings[OURS]), (rival, rivals[rival]))
    mine = trace_losses(results, OURS, settings[OURS])
    theirs = trace_losses(results, rival, rivals[rival])
    regrets = regret(results, OURS)
    return [
        Target(f"loss over that of {rival}", geometric_mean(ratios), 0.80),
        Target("likewise, its upper 95 % bound over seeds", upper_bound(ratios), 0.80),
        Target("traces on which that rival is better",
               float(sum(mine[t] > theirs[t] for t in mine)), 1),
        Target("regret in GPU-hours, 90 to 99.5 %", geometric_mean(regrets.values()), 1.10),
        Target("likewise, the worst trace", max(regrets.values()), 1.25),
        *targets,
    ]  # fmt: skip


def volumes(results: Sequence[Result], headroom: float) -> dict[str, dict[str, float]]:
    """Hypervolumes of the frontiers by trace and policy, means over seeds."""
    found: dict[str, dict[str, float]] = {}
    for trace in dict.fromkeys(r.trace for r in results):
        for policy in dict.fromkeys(r.policy for r in results):
            values = []
            for seed in sorted({r.seed for r in results}):
                here = [r for r in results if (r.trace, r.seed) == (trace, seed)]
                static = next(r.ratio for r in here if r.policy == STATIC)
                values.append(hypervolume(here, policy, headroom * static))
            found.setdefault(trace, {})[policy] = sum(values) / len(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.autoscaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    plan = Plan()
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--fleet", choices=sorted(FLEETS), default=plan.fleet)
    parser.add_argument("--peak-replicas", type=int, default=plan.peak_replicas)
    parser.add_argument("--minutes", type=float, default=plan.minutes)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--startup-s", type=float, default=plan.startup_s)
    parser.add_argument("--kernel-s", type=float, default=plan.kernel_s)
    parser.add_argument("--headroom", type=float, default=plan.headroom)
    parser.add_argument("--slowdown", type=float, default=plan.slowdown)
    parser.add_argument("--policy", nargs="+", choices=sorted(POLICIES), default=list(POLICIES))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    plan = Plan(**{name: getattr(arguments, name) for name in asdict(plan)})
    policies = [OURS, *(name for name in arguments.policy if name != OURS)]
    console.print(f"settings: { {name: POLICIES[name][1] for name in policies} }")
    results: list[Result] = []
    try:
        for path in arguments.trace:
            for seed in range(arguments.seeds):
                case = Case(path, seed, plan)
                results += results_of(case, policies)
                console.print(told(case))
    except (TraceError, SimulationError) as error:
        console.print(f"[red]{error}[/red]")
        raise SystemExit(1) from error
    settings = {**best_settings(results), OURS: DEFAULT}
    show(results, settings)
    claimed = claims(results, settings)
    for target in claimed:
        if not math.isfinite(target.value):
            console.print(f"{target.name}: not reached, or not known from one seed")
    claimed = [target for target in claimed if math.isfinite(target.value)]
    name = "autoscaling" if plan.fleet == Plan.fleet else f"autoscaling_{plan.fleet}"
    finish(name, claimed,
           figures(results, settings, plan, arguments), save=arguments.save)  # fmt: skip


def figures(
    results: Sequence[Result],
    settings: dict[str, float],
    plan: Plan,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    traces = [path.name for path in arguments.trace]
    return {
        "set_up": asdict(plan) | {"traces": traces, "seeds": arguments.seeds},
        "settings": settings,
        "mean_losses": mean_losses(results, settings),
        "hypervolumes": volumes(results, plan.headroom),
        "runs": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    main()
