"""`tandem simulate`: a fleet under a trace, before anybody pays for it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.known import KNOWN, find_model
from tandem_runtime.roofline.model import ServedModel

from tandem.plan.commands import (
    EFFICIENCY,
    LIMITS,
    PIPED_WIDTH,
    Compute,
    GpuName,
    KvCache,
    MemorySpeed,
    Price,
    Weights,
    choose_gpu,
)
from tandem.simulate.nodes.command import simulate_nodes_command
from tandem.simulate.objects import Hardware, make_scaler, make_setup, read_fleet, read_policies
from tandem.simulate.plot import summary_rows, write_html, write_png
from tandem.simulate.report import course, summarise
from tandem.simulate.run import Run, SimulationError
from tandem.simulate.world import World
from tandem.traces.read import read_trace
from tandem.traces.synthetic import Kind, Synthetic, make_trace
from tandem.traces.trace import Trace, TraceError, cut

console = Console(
    highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH
)
T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Adds the command to the `tandem` program."""
    app.command("simulate")(simulate_command)
    app.command("simulate-nodes")(simulate_nodes_command)


def simulate_command(
    fleet: Annotated[Path, typer.Option(help="YAML with one InferenceFleet.")],
    model: Annotated[
        str, typer.Option(help=f"A config.json, its folder, or one of {', '.join(KNOWN)}.")
    ],
    policy: Annotated[
        Path | None, typer.Option(help="YAML with the ScalingPolicies that the fleet refers to.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A trace file; .gz too.")] = None,
    load: Annotated[Kind | None, typer.Option(help="Instead of a trace: a synthetic load.")] = None,
    rate: Annotated[float, typer.Option(help="Requests/s of a synthetic load.")] = 1.0,
    peak: Annotated[
        float | None, typer.Option(help="Of a diurnal or step load; else thrice the rate.")
    ] = None,
    duration_s: Annotated[
        float | None, typer.Option(help="Of a synthetic load (else 3600), or of the trace.")
    ] = None,
    prompt_tokens: Annotated[float, typer.Option(help="Mean, of a synthetic load.")] = 1000.0,
    output_tokens: Annotated[float, typer.Option(help="Mean, of a synthetic load.")] = 200.0,
    start_s: Annotated[float, typer.Option(help="Where in the trace to begin.")] = 0.0,
    begins_at: Annotated[
        str,
        typer.Option(help="When that is, for a policy's schedules: 2024-01-01T08:00+01:00, say."),
    ] = "2024-01-01T00:00Z",
    speed: Annotated[float, typer.Option(help="Replay so many times as fast.")] = 1.0,
    rate_share: Annotated[
        float, typer.Option(help="Share of a rate file's requests to make.")
    ] = 1.0,
    weights: Weights = "bf16",
    kv_cache: KvCache = "bf16",
    gpu: GpuName = "H100",
    price: Price = None,
    compute_efficiency: Compute = EFFICIENCY.compute,
    memory_efficiency: MemorySpeed = EFFICIENCY.memory,
    max_running: Annotated[int, typer.Option(help="Streams of a replica.")] = LIMITS.max_running,
    chunk_tokens: Annotated[int, typer.Option(help="Of a prefill step.")] = LIMITS.chunk_tokens,
    startup_s: Annotated[float, typer.Option(help="From a pod's creation to Ready.")] = 100.0,
    expiry_s: Annotated[
        float, typer.Option(help="How long a request may wait for its first token.")
    ] = 30.0,
    failures_s: Annotated[
        float | None, typer.Option(help="Mean time between failures of a replica.")
    ] = None,
    slowdown: Annotated[float, typer.Option(help="Factor on every step's time.")] = 1.0,
    skip_s: Annotated[float, typer.Option(help="Do not count requests before this.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write picture and summary.")] = None,
) -> None:
    """Replay a trace against a fleet, sized by the operator's own law, in simulated time."""

    def requests() -> Trace:
        if (trace is None) == (load is None):
            raise TraceError("give either --trace FILE or --load poisson, diurnal or step")
        if load is not None:
            most = peak if peak is not None else (rate if load is Kind.POISSON else 3 * rate)
            length_s = 3600.0 if duration_s is None else duration_s
            made = Synthetic(load, rate, most, length_s, prompt_tokens, output_tokens)
            return make_trace(made, seed)
        assert trace is not None
        whole = read_trace(trace, seed, rate_share)
        return cut(whole, start_s=start_s, length_s=duration_s, speed=speed)

    def hardware() -> Hardware:
        return Hardware(
            model=ServedModel(find_model(model), weights, kv_cache),
            gpu=choose_gpu(gpu, price, None),
            efficiency=replace(EFFICIENCY, compute=compute_efficiency, memory=memory_efficiency),
            limits=replace(LIMITS, max_running=max_running, chunk_tokens=chunk_tokens),
            startup_s=startup_s,
            expiry_s=expiry_s,
            failures_s=failures_s,
            slowdown=slowdown,
            seed=seed,
        )

    replayed = _attempt(requests)
    begun_s = time.perf_counter()
    run = _attempt(lambda: _simulate(fleet, policy, hardware(), replayed, _unix_s(begins_at)))
    took_s = time.perf_counter() - begun_s
    _print(run, skip_s, took_s)
    title = f"{fleet.stem} under {replayed.name}"
    if json_file is not None:
        json_file.write_text(json.dumps(run_json(run, skip_s), indent=1) + "\n")
    if png is not None:
        write_png(run, title, png)
    if html is not None:
        write_html(run, summary_rows(summarise(run, skip_s)), title, html)


def _unix_s(text: str) -> float:
    """Raises SimulationError."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise SimulationError(
            f"--begins-at {text} is no date and time: give 2024-01-01T08:00 (UTC) or "
            "2024-01-01T08:00+01:00"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _simulate(
    fleet: Path, policy: Path | None, hardware: Hardware, trace: Trace, begins_s: float
) -> Run:
    view = read_fleet(fleet)
    policies = () if policy is None else read_policies(policy)
    setup = make_setup(view.spec, hardware)
    return World(setup, trace, make_scaler(view, setup, policies, begins_s)).run()


def run_json(run: Run, skip_s: float) -> dict[str, Any]:
    """For programs. The same run gives the same bytes; latencies that never came are null."""
    setup = run.setup
    return {
        "trace": {"name": run.requests.trace.name, "notes": run.requests.trace.notes},
        "targets": {"ttft_s": setup.ttft_s, "tpot_s": setup.tpot_s},
        "summary": asdict(summarise(run, skip_s)),
        "pools": [spec.name for spec in setup.pools],
        "course": [
            asdict(b) | {"ttft_s": None if b.ttft_s == float("inf") else b.ttft_s}
            for b in course(run)
        ],
        "decisions": [
            {"at_s": sample.at_s, "sizes": sample.sizes, "reasons": sample.reasons}
            for sample, before in zip(run.samples[1:], run.samples, strict=False)
            if sample.sizes != before.sizes
        ],
    }


def _print(run: Run, skip_s: float, took_s: float) -> None:
    trace = run.requests.trace
    console.print(
        f"{trace.name}: {len(trace):,} requests in {trace.duration_s:,.0f} s, simulated in "
        f"{took_s:.1f} s"
    )
    for note in trace.notes:
        console.print(f"[dim]{note}[/dim]")
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("result", justify="right")
    for name, value in summary_rows(summarise(run, skip_s)):
        table.add_row(name, value)
    console.print(table)


def _attempt(action: Callable[[], T]) -> T:
    """The action's result, or its sentence and exit status 1."""
    try:
        return action()
    except (RooflineError, SimulationError, TraceError) as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    Console(highlight=False, soft_wrap=True, stderr=True).print(f"[red]{sentence}[/red]")
    raise typer.Exit(1)
