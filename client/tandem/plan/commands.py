"""`tandem plan`: what a fleet would take, with the arithmetic shown."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.gpus import GPUS, Gpu, find_gpu
from tandem_runtime.roofline.known import KNOWN, find_model
from tandem_runtime.roofline.model import ModelShape, ServedModel, model_from_numbers
from tandem_runtime.roofline.replica import Efficiency, Memory

from tandem.plan.errors import PlanError
from tandem.plan.explain import explain, si
from tandem.plan.fleet import FleetPlan, Question, plan_fleet
from tandem.plan.load import Limits, Load, Targets
from tandem.plan.tiers import parse_tier

PIPED_WIDTH = 130
console = Console(
    highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH
)
T = TypeVar("T")

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", help=f"A config.json, the folder that holds it, or one of {', '.join(KNOWN)}."
    ),
]
GpuName = Annotated[str, typer.Option("--gpu", help=f"One of {', '.join(GPUS)}.")]
Weights = Annotated[str, typer.Option(help="Number format of weights: bf16, fp8, int8 or int4.")]
KvCache = Annotated[str, typer.Option(help="Number format of the KV cache: bf16 or fp8.")]
Price = Annotated[float | None, typer.Option(help="Dollars for a GPU-hour; else the catalogue's.")]
Compute = Annotated[float, typer.Option(help="Share of the data sheet's FLOP/s that is reached.")]
MemorySpeed = Annotated[float, typer.Option(help="Share of its memory bandwidth.")]
GpusPerNode = Annotated[
    int | None, typer.Option(help="GPUs that can share a replica; else the catalogue's.")
]
EFFICIENCY = Efficiency()
LIMITS = Limits()


class Output(StrEnum):
    """How a plan is printed."""

    TABLE = "table"
    JSON = "json"


def register(app: typer.Typer) -> None:
    """Adds the command to the `tandem` program."""
    app.command("plan")(plan_command)


def plan_command(
    model: ModelName = None,
    params: Annotated[float | None, typer.Option(help="Parameters, such as 1.8e12.")] = None,
    active_params: Annotated[
        float | None, typer.Option(help="Of these, what one token is multiplied with.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --params.")] = None,
    heads: Annotated[int | None, typer.Option(help="With --params.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="With --params.")] = None,
    head_dim: Annotated[int, typer.Option(help="With --params.")] = 128,
    experts: Annotated[int, typer.Option(help="With --active-params.")] = 0,
    experts_per_token: Annotated[int, typer.Option(help="With --active-params.")] = 0,
    weights: Weights = "bf16",
    kv_cache: KvCache = "bf16",
    gpu: GpuName = "H100",
    gpus_per_node: GpusPerNode = None,
    price: Price = None,
    requests_per_second: Annotated[float, typer.Option(help="Arrivals.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Of a request.")] = 2000,
    output_tokens: Annotated[int, typer.Option(help="Of a request.")] = 500,
    cached_tokens: Annotated[int, typer.Option(help="Of each prompt, in a cache tier.")] = 0,
    prompt_cv: Annotated[
        float, typer.Option(help="Coefficient of variation of prompt lengths.")
    ] = 1.0,
    ttft_ms: Annotated[float, typer.Option("--ttft-ms", help="Target.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option("--tpot-ms", help="Target.")] = 50.0,
    percentile: Annotated[float, typer.Option(help="Of requests that keep the targets.")] = 95.0,
    tier: Annotated[
        list[str] | None, typer.Option(help="A cache tier of a replica, such as host=64Gi.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Streams of a replica.")] = LIMITS.max_running,
    chunk_tokens: Annotated[int, typer.Option(help="Of a prefill step.")] = LIMITS.chunk_tokens,
    compute_efficiency: Compute = EFFICIENCY.compute,
    memory_efficiency: MemorySpeed = EFFICIENCY.memory,
    output: Annotated[Output, typer.Option(help="table or json.")] = Output.TABLE,
) -> None:
    """Size a fleet by arithmetic: GPUs, replicas, batch, latency, memory and prices."""

    def question() -> Question:
        shape = (
            _shape_from_numbers(
                params, active_params, layers, heads, kv_heads, head_dim, experts, experts_per_token
            )
            if model is None
            else _shape_from_file(model, params)
        )
        return Question(
            model=ServedModel(shape, weights, kv_cache),
            gpu=choose_gpu(gpu, price, gpus_per_node),
            load=Load(requests_per_second, prompt_tokens, output_tokens, cached_tokens, prompt_cv),
            targets=Targets(ttft_ms / 1e3, tpot_ms / 1e3, percentile / 100),
            limits=replace(LIMITS, max_running=max_running, chunk_tokens=chunk_tokens),
            efficiency=replace(EFFICIENCY, compute=compute_efficiency, memory=memory_efficiency),
            memory=Memory(),
            tiers=tuple(parse_tier(text) for text in tier or ()),
        )

    plan = _attempt(lambda: plan_fleet(question()))
    if output is Output.JSON:
        typer.echo(json.dumps(plan_json(plan), indent=2))
    else:
        _print(plan)


def choose_gpu(name: str, price: float | None, gpus_per_node: int | None) -> Gpu:
    """A GPU of the catalogue with the user's own price and node size. Raises PlanError."""
    gpu = find_gpu(name)
    if price is not None:
        if not 0 <= price < math.inf:
            raise PlanError(f"a price of {price:g} $ an hour: give at least 0")
        gpu = replace(gpu, usd_per_hour=price)
    if gpus_per_node is not None:
        if gpus_per_node < 1:
            raise PlanError(f"{gpus_per_node} GPUs per node: give at least 1")
        gpu = replace(gpu, gpus_per_node=gpus_per_node)
    return gpu


def plan_json(plan: FleetPlan) -> dict[str, Any]:
    """For programs: the plan's figures by name, then each with its formula."""
    prefill, decode = plan.prefill, plan.decode
    return {
        "model": plan.question.model.shape.name,
        "gpu": plan.question.gpu.name,
        "prefill": {
            "replicas": prefill.replicas,
            "gpus_per_replica": prefill.replica.gpus,
            "ttft_s": prefill.first_token_s,
            "busy": prefill.busy,
        },
        "decode": {
            "replicas": decode.replicas,
            "gpus_per_replica": decode.replica.gpus,
            "max_batch": decode.max_batch,
            "bound": decode.bound,
            "mean_batch": decode.mean_batch,
            "tpot_s": decode.output_token_s,
            "tokens_per_s": decode.tokens_per_s,
        },
        "gpus": plan.gpus,
        "usd_per_hour": plan.usd_per_hour,
        "usd_per_million_tokens": asdict(plan.prices),
        "usd_per_million_tokens_never_idle": asdict(plan.full_prices),
        "cache_tiers": [asdict(tier) for tier in plan.tiers],
        "lines": [asdict(line) for line in explain(plan)],
    }


def _shape_from_file(name: str, params: float | None) -> ModelShape:
    if params is not None:
        raise PlanError("--model and --params exclude each other: the config.json says both")
    return find_model(name)


def _shape_from_numbers(
    params: float | None,
    active_params: float | None,
    layers: int | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int,
    experts: int,
    experts_per_token: int,
) -> ModelShape:
    if params is None or layers is None or heads is None or kv_heads is None:
        raise PlanError(
            "which model? Give --model with a config.json, or --params, --layers, --heads and "
            "--kv-heads (and --active-params, --experts, --experts-per-token for experts)"
        )
    return model_from_numbers(
        params=params,
        active_params=active_params,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        experts_per_token=experts_per_token,
    )


def _print(plan: FleetPlan) -> None:
    question = plan.question
    console.print(
        f"{question.model.shape.name} on {question.gpu.name}: prefill {plan.prefill.replicas} x "
        f"{plan.prefill.replica.gpus} GPUs, decode {plan.decode.replicas} x "
        f"{plan.decode.replica.gpus} GPUs, {plan.usd_per_hour:g} $/h"
    )
    sections: dict[str, Table] = {}
    for line in explain(plan):
        table = sections.get(line.section)
        if table is None:
            table = sections[line.section] = Table(title=line.section, title_justify="left")
            for heading in ("what", "formula", "numbers"):
                table.add_column(heading, overflow="fold")
            table.add_column("result", justify="right", no_wrap=True)
        table.add_row(line.name, line.formula, line.numbers, si(line.value, line.unit))
    for table in sections.values():
        console.print(table)
    console.print(f"[dim]{question.gpu.name}: {question.gpu.source}[/dim]")


def _attempt(action: Callable[[], T]) -> T:
    """The action's result, or its sentence and exit status 1."""
    try:
        return action()
    except RooflineError as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    Console(highlight=False, soft_wrap=True, stderr=True).print(f"[red]{sentence}[/red]")
    raise typer.Exit(1)
