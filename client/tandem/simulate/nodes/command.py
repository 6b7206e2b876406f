"""`tandem simulate-nodes`: what failing nodes cost a fleet, with and without repair."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.known import KNOWN, find_model
from tandem_runtime.roofline.model import ServedModel
from tandem_runtime.roofline.replica import Replica

from tandem.plan.commands import PIPED_WIDTH, GpuName, KvCache, Weights, choose_gpu
from tandem.plan.load import Limits
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.nodes.failures import HOUR_S, Hazard, draw_failures
from tandem.simulate.nodes.flow import Demand
from tandem.simulate.nodes.run import (
    DEFAULT,
    Result,
    pace_of,
    policies_of,
    read_node_policy,
    result_json,
    simulate,
)
from tandem.simulate.nodes.state import ClusterSpec
from tandem.simulate.run import SimulationError

LIMITS = Limits()


def simulate_nodes_command(
    model: Annotated[
        str, typer.Option(help=f"A config.json, its folder, or one of {', '.join(KNOWN)}.")
    ] = "llama-3.1-70b",
    nodes: Annotated[int, typer.Option(help="Of the cluster; a pod has a whole one.")] = 4096,
    spare_nodes: Annotated[
        int | None, typer.Option(help="Nodes without a pod at first; else 4 % and at least 1.")
    ] = None,
    pool_pods: Annotated[int, typer.Option(help="Pods of each pool.")] = 32,
    rack_nodes: Annotated[int, typer.Option(help="Nodes that a rack's failure takes.")] = 16,
    failures_per_hour: Annotated[float, typer.Option(help="Over all nodes.")] = 12.0,
    repair_hours: Annotated[float, typer.Option(help="Mean time to mend a machine.")] = 3.0,
    days: Annotated[float, typer.Option(help="To simulate.")] = 7.0,
    load: Annotated[
        float, typer.Option(help="Share of the largest rate that keeps the targets.")
    ] = 0.85,
    prompt_tokens: Annotated[float, typer.Option(help="Mean.")] = 1000.0,
    output_tokens: Annotated[float, typer.Option(help="Mean.")] = 200.0,
    ttft_ms: Annotated[float, typer.Option(help="Target of the first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Target of each further token.")] = 50.0,
    gpu: GpuName = "H100",
    gpus: Annotated[int, typer.Option(help="Of a pod.")] = 8,
    max_running: Annotated[int, typer.Option(help="Streams of a pod.")] = 256,
    weights: Weights = "bf16",
    kv_cache: KvCache = "bf16",
    startup_s: Annotated[float, typer.Option(help="From a pod's node to Ready.")] = 100.0,
    crash_pause_s: Annotated[
        float, typer.Option(help="From a pod's death until its streams go on elsewhere.")
    ] = 2.0,
    look_every_s: Annotated[
        float, typer.Option(help="Shortest time between two plans; the operator's own is shorter.")
    ] = 60.0,
    policy: Annotated[
        Path | None, typer.Option(help="YAML with a NodeHealthPolicy; else one with everything on.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="One of: off, drains, drains and stragglers.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
) -> None:
    """Let nodes of a large fleet fail, and the operator's own plan repair them: load as rates."""
    try:
        replica = Replica(
            ServedModel(find_model(model), weights, kv_cache), choose_gpu(gpu, None, None), gpus
        )
        _check((nodes - 1, gpus, pool_pods, rack_nodes, max_running), days, look_every_s)
        if not replica.kv_capacity_tokens:
            raise SimulationError(f"{model} does not fit {gpus} {gpu}: raise --gpus")
        engine = EngineSpec(replica, LIMITS.chunk_tokens, max_running, keeps_streams=True)
        spares = max(nodes * 4 // 100, 1) if spare_nodes is None else spare_nodes
        if not 0 <= spares < nodes:
            raise SimulationError(f"{spares} spare nodes of {nodes}: leave at least one for pods")
        pods = min(pool_pods, nodes - spares)
        demand = Demand(
            1.0, prompt_tokens, output_tokens, ttft_ms / 1e3, tpot_ms / 1e3,
            crash_pause_s=crash_pause_s,
        )  # fmt: skip
        pace = pace_of(engine, demand, load, pods)
        chosen = policies_of(DEFAULT if policy is None else read_node_policy(policy))
        if only is not None and only not in chosen:
            raise SimulationError(f"--only {only}: give one of {', '.join(chosen)}")
        duration_s = days * 24 * HOUR_S
        hazard = Hazard(failures_per_hour, repair_hours)
        failures = draw_failures(hazard, nodes, duration_s, seed)
    except (RooflineError, SimulationError) as error:
        Console(highlight=False, soft_wrap=True, stderr=True).print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    results = [
        simulate(
            name,
            ClusterSpec(nodes, spares, pods, rack_nodes, startup_s, look_every_s, wanted, seed),
            pace,
            failures,
            duration_s,
        )
        for name, wanted in chosen.items()
        if only in (None, name)
    ]
    _print(results)
    if json_file is not None:
        json_file.write_text(json.dumps([result_json(r) for r in results], indent=1) + "\n")


def _check(counts: tuple[int, ...], days: float, look_every_s: float) -> None:
    """Raises SimulationError."""
    if min(counts) < 1:
        raise SimulationError(
            "give at least 2 nodes, and at least 1 GPU, pod, node of a rack and running stream"
        )
    if not (0 < days < math.inf and 0 < look_every_s < math.inf):
        raise SimulationError("give days and seconds between plans above 0")


def _print(results: list[Result]) -> None:
    console = Console(
        highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH
    )
    table = Table()
    table.add_column("")
    for result in results:
        table.add_column(result.policy, justify="right")
    for name, values in _rows(results):
        table.add_row(name, *values)
    console.print(table)


def _rows(results: list[Result]) -> list[tuple[str, list[str]]]:
    def row(name: str, form: str, value: str) -> tuple[str, list[str]]:
        found = [getattr(result, value) for result in results]
        return name, ["-" if v is None else format(v, form) for v in found]

    return [
        row("within both targets", ".3%", "attained"),
        row("streams interrupted by a death", ",.0f", "interrupted"),
        row("pool-hours below size", ",.1f", "short_pod_hours"),
        row("least of a pool's size that served", ".0%", "fewest_share"),
        row("pools short of pods at the end", "d", "unfilled_pools"),
        row("nodes in repair, mean", ".1f", "mean_in_repair"),
        row("most", "d", "most_in_repair"),
        row("nodes held, mean", ".1f", "mean_held"),
        row("repairs begun over the brake", "d", "over_the_brake"),
        row("serving pods taken under the floor, by us", "d", "under_the_floor"),
        row("stragglers found", "d", "stragglers_found"),
        row("after, median s", ",.0f", "found_after_s"),
        row("plans made", ",d", "plans"),
    ]
