"""Whether `tandem simulate` says what a live fleet does: the same requests, in both.

    .venv/bin/python -m benchmarks.fidelity [--quick] [--trace FILE ...]

A local cluster with a fleet of paced pods (no accelerator is there; see docs/how-to): one prefill
pod and two decode pods of a fixed size. Ten minutes of a trace, thinned to what this machine can
play, are sent to its gateway as they come, and simulated. Before the traces given: Poisson arrivals
with exponential lengths.

Two numbers are calibrated, on the first two minutes: the factor on every step's time (`--slowdown`)
that gives the live median time per output token, and what the median first token takes beyond the
simulated one, a constant: front end, gateway, and the ends of steps that a handoff waits for. The
rest is compared: TTFT and TPOT, median and 95th percentile. TPOT is of answers with 16 tokens and
more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table
from tandem.cluster.paths import cache_home
from tandem.plan.load import Limits
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.pool import PoolSpec
from tandem.simulate.run import Setup
from tandem.simulate.scalers import Fixed
from tandem.simulate.world import World
from tandem.traces.read import read_trace
from tandem.traces.synthetic import Kind, Synthetic, make_trace
from tandem.traces.trace import Trace, cut
from tandem_runtime.checkpoint.tiny import write_tiny
from tandem_runtime.roofline.stated import stated_replica

from benchmarks.fleet import cluster, note, serve
from benchmarks.report import Target, finish
from benchmarks.scaling_live.load import Answer, random_prompt, stream

PACE: Final = "mi300x:llama-3.1-70b"
DECODE_PODS: Final = 2
PER_S: Final = 1.5
"""Requests, on average: what this machine can stream."""
MOST_PROMPT_TOKENS: Final = 6000
MOST_OUTPUT_TOKENS: Final = 400
LEAST_TOKENS: Final = 16
"""Of an answer whose time per token counts."""
LONG_S: Final = 600.0
CALIBRATED_S: Final = 120.0
BOUND: Final = 0.15
QUANTILES: Final = (0.5, 0.95)


@dataclass(frozen=True)
class Outcome:
    """What became of each request of a trace, in order; seconds. Negative: it never came."""

    ttft_s: Sequence[float]
    tpot_s: Sequence[float]

    def figures(self, trace: Trace, from_s: float, to_s: float) -> dict[str, float]:
        """By name, the quantiles over what arrived in between. Raises ValueError: nothing did."""
        chosen = [i for i, at_s in enumerate(trace.arrival_s) if from_s <= at_s < to_s]
        whole = [i for i in chosen if self.ttft_s[i] >= 0.0]
        long = [i for i in whole if trace.output_tokens[i] >= LEAST_TOKENS]
        if not long:
            raise ValueError(f"no answer of {LEAST_TOKENS} tokens arrived in the time: give more")
        found = {}
        for share in QUANTILES:
            found[f"TTFT p{100 * share:g}"] = quantile([self.ttft_s[i] for i in whole], share)
            found[f"TPOT p{100 * share:g}"] = quantile([self.tpot_s[i] for i in long], share)
        return found


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so much of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def thinned(trace: Trace, per_s: float, seed: int) -> Trace:
    """A trace with fewer requests, chosen by chance, of lengths that a paced pod can play."""
    share = min(1.0, per_s * trace.duration_s / max(1, len(trace)))
    chance = random.Random(seed)
    kept = [i for i in range(len(trace)) if chance.random() < share]
    return Trace(
        name=trace.name,
        arrival_s=[trace.arrival_s[i] for i in kept],
        prompt_tokens=[min(MOST_PROMPT_TOKENS, trace.prompt_tokens[i]) for i in kept],
        output_tokens=[min(MOST_OUTPUT_TOKENS, trace.output_tokens[i]) for i in kept],
        duration_s=trace.duration_s,
    )


def load_of(file: Path | None, length_s: float) -> Trace:
    """What is played."""
    if file is None:
        made = Synthetic(Kind.POISSON, PER_S, PER_S, length_s, 1200.0, 120.0)
        return thinned(make_trace(made, 0), PER_S, 0)
    return thinned(cut(read_trace(file, 0), length_s=length_s), PER_S, 0)


async def play(url: str, model: str, trace: Trace) -> tuple[Outcome, list[str]]:
    """Sends each request when it is due; the errors of those that failed."""
    begun_s = time.monotonic() + 1.0
    chance = random.Random(1)
    prompts = [random_prompt(chance, tokens) for tokens in trace.prompt_tokens]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600.0, limits=limits) as http:

        async def one(i: int) -> Answer:
            await asyncio.sleep(max(0.0, begun_s + trace.arrival_s[i] - time.monotonic()))
            return await stream(http, url, model, prompts[i], trace.output_tokens[i])

        answers = await asyncio.gather(*(one(i) for i in range(len(trace))))
    errors = [a.error for a in answers if a.error]
    ttft_s = [-1.0 if a.error else a.ttft_s for a in answers]
    return Outcome(ttft_s, [a.tpot_s for a in answers]), errors


def simulate(trace: Trace, slowdown: float) -> Outcome:
    """The same in simulated time."""
    limits = Limits()
    engine = EngineSpec(
        stated_replica(PACE, gpus=1), limits.chunk_tokens, limits.max_running, False, slowdown
    )
    pools = (
        PoolSpec("prefill", "prefill", engine, 1, 100.0, 600.0),
        PoolSpec(
            "decode", "decode", replace(engine, keeps_streams=True), DECODE_PODS, 100.0, 600.0
        ),
    )
    setup = Setup(pools, 1.0, 0.05, expiry_s=600.0, handoff_bytes_per_s=limits.handoff_bytes_per_s)
    done = World(setup, trace, Fixed()).run().requests
    tpot_s = [
        (ended_s - at_s - first_s) / max(1, tokens - 1)
        for ended_s, at_s, first_s, tokens in zip(
            done.finished_s, trace.arrival_s, done.first_token_s, trace.output_tokens, strict=True
        )
    ]
    return Outcome(done.first_token_s, tpot_s)


def calibrated(trace: Trace, live: Outcome) -> tuple[float, float]:
    """The slowdown with which the first two minutes have the live median TPOT, by bisection; and
    how many seconds their median TTFT is short then."""
    wanted = live.figures(trace, 0.0, CALIBRATED_S)
    low, high = 0.5, 4.0
    for _ in range(24):
        middle = (low + high) / 2
        found_s = simulate(trace, middle).figures(trace, 0.0, CALIBRATED_S)["TPOT p50"]
        low, high = (middle, high) if found_s < wanted["TPOT p50"] else (low, middle)
    slowdown = (low + high) / 2
    found = simulate(trace, slowdown).figures(trace, 0.0, CALIBRATED_S)
    return slowdown, wanted["TTFT p50"] - found["TTFT p50"]


@dataclass(frozen=True)
class Compared:
    """One trace, live and simulated."""

    name: str
    requests: int
    slowdown: float
    first_token_s: float
    """What is added to every simulated TTFT."""
    live: dict[str, float]
    simulated: dict[str, float]
    errors: list[str]

    def off(self, name: str) -> float:
        """Simulated over live, less 1."""
        return self.simulated[name] / self.live[name] - 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            "trace": self.name,
            "requests": self.requests,
            "slowdown": round(self.slowdown, 4),
            "first_token_s": round(self.first_token_s, 4),
            "live_s": self.live,
            "simulated_s": self.simulated,
            "errors": sorted(set(self.errors))[:3],
        }


def compare(url: str, model: str, trace: Trace) -> Compared:
    """Plays a trace, and simulates it."""
    note(f"{trace.name}: {len(trace)} requests in {trace.duration_s:.0f} s")
    live, errors = asyncio.run(play(url, model, trace))
    slowdown, first_token_s = calibrated(trace, live)
    rest = (CALIBRATED_S, trace.duration_s)
    simulated = simulate(trace, slowdown)
    simulated = Outcome([at_s + first_token_s for at_s in simulated.ttft_s], simulated.tpot_s)
    return Compared(
        trace.name,
        len(trace),
        slowdown,
        first_token_s,
        live.figures(trace, *rest),
        simulated.figures(trace, *rest),
        errors,
    )


def show(found: Sequence[Compared]) -> None:
    """A row for each figure."""
    table = Table(title=f"pods paced as {PACE}, one prefill and {DECODE_PODS} decode; ms")
    for heading in ("trace", "slowdown", "added", "figure", "live", "simulated", "off"):
        table.add_column(heading, justify="right")
    for one in found:
        for name in one.live:
            table.add_row(
                one.name,
                f"{one.slowdown:.3f}",
                f"{1000 * one.first_token_s:.0f}",
                name,
                f"{1000 * one.live[name]:.1f}",
                f"{1000 * one.simulated[name]:.1f}",
                f"{100 * one.off(name):+.1f} %",
            )
    Console(width=110).print(table)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="four minutes instead of ten")
    parser.add_argument("--trace", type=Path, action="append", help="a trace file; repeatable")
    options = parser.parse_args()
    length_s = 2.0 * CALIBRATED_S if options.quick else LONG_S
    traces = [load_of(file, length_s) for file in [None, *(options.trace or ())]]
    # Containers see it; /tmp and the cluster's own folder they do not.
    seen = tempfile.TemporaryDirectory(dir=cache_home().parent)
    with cluster("fidelity") as running, seen as folder:
        write_tiny(Path(folder))
        fleet = serve(
            running,
            "paced",
            prefill=1,
            decode=DECODE_PODS,
            dtype="bfloat16",
            uri=f"file://{folder}",
            arguments=["--pace", PACE],
        )
        found = [compare(fleet.url, fleet.model, trace) for trace in traces]
    show(found)
    targets = [Target("requests that failed", sum(len(one.errors) for one in found), 0)]
    for one in found:
        targets += [
            Target(f"{one.name}: {name}, off by", round(abs(one.off(name)), 3), BOUND)
            for name in one.live
        ]
    finish(
        "fidelity",
        targets,
        {
            "quick": options.quick,
            "pace": PACE,
            "load_average": round(os.getloadavg()[2], 1),
            "compared": [one.as_json() for one in found],
        },
    )


if __name__ == "__main__":
    main()
