"""Attainment against GPU-hours: the operator's law and its rivals in one simulator.

    .venv/bin/python -m benchmarks.autoscaling --trace FILE [FILE ...]

Each trace is multiplied until the least static sizes that keep 99 % of requests (both targets) are
about --peak-replicas; its first --minutes are replayed. Targets: TTFT max(1 s, 3 x the prompt
alone), TPOT 25 ms (8b) or 40 ms (70b) for answers of 16 tokens and more; a request waits 30 s at
most, and one that is given up is missed. Every policy begins at half the static sizes, may use 1.25
times them, and is counted after 300 s; GPU-hours run from a pod's creation to its deletion.

    loss = GPU-hours / the clairvoyant plan's + 0.1 for each point of attainment under 99 %

Rivals are searched on the grid that is printed, and reported at the one setting that is best over
all traces given; ours has one setting. The defaults end in minutes and show the shape of things;
the published set-up is --peak-replicas 24 --minutes 60 --seeds 5.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tandem.simulate.scalers import Fixed, LawGroup, OperatorLaw, Scaler
from tandem.traces.read import read_trace
from tandem.traces.trace import Trace, TraceError, cut
from tandem_operator.plan.scaling.policy import Policy

from benchmarks.autoscaling.reference import (
    StaticPeak,
    clairvoyant,
    most_streams,
    scaled_to_peak,
)
from benchmarks.autoscaling.rivals import (
    Bounds,
    Hpa,
    IntervalForecast,
    PerPool,
    SloLaw,
    TokenVelocity,
    concurrency,
    output_work,
    prompt_work,
    queue_depth,
)
from benchmarks.autoscaling.setup import FLEETS, FleetKind, Score, make_setup, play, prompt_s, score
from benchmarks.report import finish

OURS = "tandem"
CLAIRVOYANT = "clairvoyant"
STATIC = "static peak"
HEADROOM = 1.25
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class Case:
    """One trace at one seed."""

    name: str
    kind: FleetKind
    peak: StaticPeak
    startup_s: float

    @property
    def bounds(self) -> dict[str, Bounds]:
        return {n: Bounds(1, math.ceil(HEADROOM * s)) for n, s in self.peak.sizes.items()}

    @property
    def first_sizes(self) -> dict[str, int]:
        return {name: math.ceil(size / 2) for name, size in self.peak.sizes.items()}

    def score(self, scaler: Scaler) -> Score:
        setup = make_setup(self.kind, self.first_sizes, self.startup_s)
        return score(play(setup, self.peak.trace, scaler), self.kind)


Make = Callable[[Case, float], Scaler]


def ours(case: Case) -> Scaler:
    """The operator's law with its default policy."""
    policies = {
        name: Policy(
            role="prefill" if name == "prefill" else "decode",
            min_replicas=bound.least,
            max_replicas=bound.most,
            ttft_ms=1000.0,
            tpot_ms=1e3 * case.kind.tpot_s,
            gpus_per_replica=case.kind.replica.gpus,
        )
        for name, bound in case.bounds.items()
    }
    return OperatorLaw([LawGroup(policies)])


def _hpa(case: Case, target: float) -> Scaler:
    most = most_streams(case.kind, case.peak.trace)
    rules = {"prefill": Hpa(concurrency, target * 4), "decode": Hpa(concurrency, target * most)}
    return PerPool(rules, case.bounds)


def _keda(case: Case, target: float) -> Scaler:
    rules = {name: Hpa(queue_depth, target, every_s=30.0) for name in ("prefill", "decode")}
    return PerPool(rules, case.bounds)


def _slo(case: Case, high: float) -> Scaler:
    low, tpot_ms = high * 0.40 / 0.55, 1e3 * case.kind.tpot_s
    rules = {
        "prefill": SloLaw(lambda load: load.ttft_ms, 1000.0, high, low),
        "decode": SloLaw(lambda load: load.tpot_ms, tpot_ms, high, low),
    }
    return PerPool(rules, case.bounds)


def _profile(case: Case) -> tuple[float, float]:
    """Prompt tokens/s and output tokens/s of a full replica of the trace's mean context."""
    replica, trace = case.kind.replica, case.peak.trace
    streams = most_streams(case.kind, trace)
    context = (sum(trace.prompt_tokens) + sum(trace.output_tokens) / 2) / len(trace)
    return 2048 / prompt_s(replica, 2048), streams / replica.decode_s(streams, streams * context)


def _forecast(case: Case, use: float) -> Scaler:
    prompts, outputs = _profile(case)
    rules = {
        "prefill": IntervalForecast(prompt_work, prompts, use),
        "decode": IntervalForecast(output_work, outputs, use),
    }
    return PerPool(rules, case.bounds)


def _velocity(case: Case, use: float) -> Scaler:
    prompts, outputs = _profile(case)
    rules = {
        "prefill": TokenVelocity(prompt_work, prompts, use),
        "decode": TokenVelocity(output_work, outputs, use),
    }
    return PerPool(rules, case.bounds)


RIVALS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "HPA on concurrency": (_hpa, (0.06, 0.12, 0.25, 0.5)),
    "KEDA on queue depth": (_keda, (0.1, 0.3, 1.0, 5.0)),
    "llm-d SLO law": (_slo, (0.1, 0.2, 0.3, 0.55)),
    "forecast per 180 s": (_forecast, (0.1, 0.2, 0.4, 0.6)),
    "token velocity": (_velocity, (0.1, 0.2, 0.4, 0.6)),
}


@dataclass(frozen=True)
class Result:
    """A policy at one setting on one case."""

    case: str
    policy: str
    setting: float | None
    score: Score
    loss: float


def results_of(case: Case) -> tuple[str, list[Result]]:
    """All policies on a case, the clairvoyant plan first."""
    most = {name: bound.most for name, bound in case.bounds.items()}
    plan, work_hours = clairvoyant(case.kind, case.peak, most, case.startup_s)
    least = plan.gpu_hours
    sentence = (
        f"{case.name}: {len(case.peak.trace):,} requests ({case.peak.factor:.2f}x), "
        f"static peak {dict(case.peak.sizes)}; clairvoyant {least:.2f} GPU-hours at "
        f"{plan.attained:.2%}, {least / work_hours:.2f}x its work alone"
    )

    def result(policy: str, setting: float | None, found: Score) -> Result:
        return Result(case.name, policy, setting, found, found.loss(least))

    setup = make_setup(case.kind, case.peak.sizes, case.startup_s)
    static = score(play(setup, case.peak.trace, Fixed()), case.kind)
    results = [
        result(CLAIRVOYANT, None, plan),
        result(STATIC, None, static),
        result(OURS, None, case.score(ours(case))),
    ]
    for name, (make, grid) in RIVALS.items():
        results += [result(name, setting, case.score(make(case, setting))) for setting in grid]
    return sentence, results


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def best_settings(results: list[Result]) -> dict[str, float | None]:
    """Of each policy the one setting with the least loss over all cases."""
    losses: dict[tuple[str, float | None], list[float]] = defaultdict(list)
    for result in results:
        losses[result.policy, result.setting].append(result.loss)
    best: dict[str, float | None] = {}
    for (policy, setting), values in losses.items():
        known = losses.get((policy, best.get(policy, setting)), values)
        if policy not in best or geometric_mean(values) < geometric_mean(known):
            best[policy] = setting
    return best


def show(results: list[Result], best: Mapping[str, float | None]) -> None:
    """A table for each case, of the settings that were chosen; then the means."""
    chosen = [r for r in results if best[r.policy] == r.setting]
    for case in dict.fromkeys(r.case for r in chosen):
        table = Table(title=case, title_justify="left")
        for heading in ("policy", "setting", "within targets", "GPU-hours", "x clairvoyant",
                        "loss", "scale events/h"):  # fmt: skip
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        least = next(r.score.gpu_hours for r in chosen if (r.case, r.policy) == (case, CLAIRVOYANT))
        for r in (r for r in chosen if r.case == case):
            table.add_row(
                r.policy, "" if r.setting is None else f"{r.setting:g}", f"{r.score.attained:.2%}",
                f"{r.score.gpu_hours:.2f}", f"{r.score.gpu_hours / least:.2f}", f"{r.loss:.2f}",
                f"{r.score.scale_events_per_h:.0f}",
            )  # fmt: skip
        console.print(table)
    for policy, (_, grid) in RIVALS.items():
        if best[policy] in (grid[0], grid[-1]):
            console.print(f"{policy}: its best setting is at the grid's edge; a wider one may help")
    for policy, loss in sorted(mean_losses(chosen).items(), key=lambda item: item[1]):
        console.print(f"{policy}: geometric mean of the loss {loss:.2f}")


def mean_losses(chosen: list[Result]) -> dict[str, float]:
    losses: dict[str, list[float]] = defaultdict(list)
    for result in chosen:
        losses[result.policy].append(result.loss)
    return {policy: geometric_mean(values) for policy, values in losses.items()}


def run_case(path: Path, seed: int, arguments: argparse.Namespace) -> tuple[str, list[Result]]:
    """All policies on one trace at one seed, and what the trace became. Raises TraceError."""
    kind = FLEETS[arguments.fleet]
    trace = _long(cut(read_trace(path), length_s=60.0 * arguments.minutes), arguments.minutes)
    name = path.name.partition(".")[0] + (f", seed {seed}" if arguments.seeds > 1 else "")
    peak = scaled_to_peak(kind, trace, arguments.peak_replicas, arguments.startup_s, seed)
    return results_of(Case(name, kind, peak, arguments.startup_s))


def _long(trace: Trace, minutes: float) -> Trace:
    """Raises TraceError: nothing would be left after the first 300 s."""
    if trace.duration_s < 600:
        raise TraceError(
            f"{trace.name} has {trace.duration_s:.0f} s in its first {minutes:g} minutes: at least "
            "600 s are needed, of which 300 s are not counted"
        )
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.autoscaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--fleet", choices=sorted(FLEETS), default="8b")
    parser.add_argument("--peak-replicas", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--startup-s", type=float, default=100)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    console.print(f"settings: { {name: grid for name, (_, grid) in RIVALS.items()} }")
    results: list[Result] = []
    jobs = [(path, seed) for path in arguments.trace for seed in range(arguments.seeds)]
    try:
        with ProcessPoolExecutor(min(len(jobs), arguments.jobs)) as pool:
            runs = [pool.submit(run_case, path, seed, arguments) for path, seed in jobs]
            for run in runs:
                sentence, found = run.result()
                console.print(sentence)
                results += found
    except TraceError as error:
        console.print(f"[red]{error}[/red]")
        raise SystemExit(1) from error
    best = best_settings(results)
    show(results, best)
    finish("autoscaling", [], figures(results, best, arguments), save=arguments.save)


def figures(
    results: list[Result], best: Mapping[str, float | None], arguments: argparse.Namespace
) -> dict[str, Any]:
    return {
        "set_up": {k: v for k, v in vars(arguments).items() if k not in ("trace", "save", "jobs")}
        | {"traces": [path.name for path in arguments.trace]},
        "best_settings": dict(best),
        "mean_losses": mean_losses([r for r in results if best[r.policy] == r.setting]),
        "runs": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    main()
