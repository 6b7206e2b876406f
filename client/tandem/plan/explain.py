"""Each figure of a plan with the formula behind it and the numbers in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tandem_runtime.roofline.model import KV_BYTES
from tandem_runtime.roofline.replica import Replica

from tandem.plan.fleet import FleetPlan
from tandem.plan.pools import DecodePool, PrefillPool

_PREFIXES: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """One figure, derived."""

    section: str
    name: str
    formula: str
    numbers: str
    value: float
    unit: str


def si(value: float, unit: str = "") -> str:
    """Four digits with a decimal prefix; seconds under one in ms."""
    if unit == "s" and 0 < abs(value) < 1:
        return f"{value * 1e3:.4g} ms"
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor and unit not in ("s", "%", "GPUs", "replicas", "$/M tokens"):
            return f"{value / factor:.4g} {prefix}{unit}".rstrip()
    return f"{value:.4g} {unit}".rstrip()


def explain(plan: FleetPlan) -> list[Line]:
    """The plan's figures in the order in which they follow from each other."""
    return [
        *_model_lines(plan),
        *_prefill_lines(plan, plan.prefill),
        *_decode_lines(plan, plan.decode),
        *_tier_lines(plan),
        *_price_lines(plan),
    ]


def _model_lines(plan: FleetPlan) -> Iterator[Line]:
    question = plan.question
    model, load, targets, gpu = question.model, question.load, question.targets, question.gpu
    shape, tokens = model.shape, load.uncached_tokens
    width = shape.attention_width
    yield Line(
        "model", "weights", "parameters x bytes (embedding and head in bf16)",
        f"{si(shape.total_params)} x {model.param_bytes:g}", model.weight_bytes, "B",
    )  # fmt: skip
    yield Line(
        "model", "KV per token", "2 x layers x kv heads x head dim x bytes",
        f"2 x {shape.layers} x {shape.kv_heads} x {shape.head_dim} x {KV_BYTES[model.kv_cache]:g}",
        model.kv_token_bytes, "B",
    )  # fmt: skip
    yield Line(
        "model", "prompt, linear layers", "2 x active parameters x uncached tokens",
        f"2 x {si(shape.layer_params)} x {tokens:,}", 2 * shape.layer_params * tokens, "FLOP",
    )  # fmt: skip
    pairs = tokens * load.cached_tokens + tokens * tokens / 2
    yield Line(
        "model", "prompt, causal attention", "4 x layers x width x pairs of tokens",
        f"4 x {shape.layers} x {width:,} x {si(pairs)}", 4 * shape.layers * width * pairs, "FLOP",
    )  # fmt: skip
    yield Line(
        "model", "bandwidth at batch 1", "weights that a token reads / TPOT",
        f"{si(model.read_bytes(1), 'B')} / {si(targets.output_token_s, 's')}",
        model.read_bytes(1) / targets.output_token_s, "B/s",
    )  # fmt: skip
    yield Line(
        "model", "GPUs for that bandwidth", "bandwidth / GPU bandwidth, rounded up",
        f"{si(model.read_bytes(1) / targets.output_token_s, 'B/s')} / "
        f"{si(gpu.memory_bytes_per_s, 'B/s')}", plan.bandwidth_gpus, "GPUs",
    )  # fmt: skip
    yield Line(
        "model", "GPUs for the memory", "(weights + one stream's KV) / usable memory, rounded up",
        f"({si(model.weight_bytes, 'B')} + "
        f"{si(load.stream_tokens * model.kv_token_bytes, 'B')} / {question.memory.kv_share:g}) / "
        f"{si(gpu.memory_bytes - question.memory.reserve_bytes, 'B')}", plan.memory_gpus, "GPUs",
    )  # fmt: skip


def _prefill_lines(plan: FleetPlan, pool: PrefillPool) -> Iterator[Line]:
    load, limits, replica = plan.question.load, plan.question.limits, pool.replica
    section = "prefill"
    yield Line(section, "GPUs per replica", "cheapest size that fits and keeps TTFT", "",
               replica.gpus, "GPUs")  # fmt: skip
    yield _speed_line(section, replica)
    yield Line(
        section, "prompt alone", "sum over chunks of linear + attention + all-reduces + overhead",
        _chunk_numbers(replica, load.uncached_tokens, load.cached_tokens, limits.chunk_tokens),
        pool.prompt_s, "s",
    )  # fmt: skip
    yield Line(
        section, "handoff", "last chunk's KV / bandwidth",
        f"{si(pool.handoff_s * limits.handoff_bytes_per_s, 'B')} / "
        f"{si(limits.handoff_bytes_per_s, 'B/s')}", pool.handoff_s, "s",
    )  # fmt: skip
    yield Line(
        section, "replicas", "fewest whose wait leaves TTFT whole", "", pool.replicas, "replicas"
    )
    yield Line(
        section, "busy", "requests/s x prompt alone / replicas",
        f"{load.requests_per_s:g} x {si(pool.prompt_s, 's')} / {pool.replicas}",
        100 * pool.busy, "%",
    )  # fmt: skip
    quantile = plan.question.targets.quantile
    yield Line(
        section, f"wait, p{100 * quantile:g}", "(1 + cv^2)/2 x prompt / idle x ln(C/(1-p))",
        f"(1 + {load.prompt_cv:g}^2)/2 x {si(pool.prompt_s, 's')} / "
        f"{pool.replicas * (1 - pool.busy):.3g} x ln(C / {1 - quantile:.3g})", pool.wait_s, "s",
    )  # fmt: skip
    yield Line(
        section, f"TTFT, p{100 * quantile:g}", "wait + prompt + handoff",
        f"{si(pool.wait_s, 's')} + {si(pool.prompt_s, 's')} + {si(pool.handoff_s, 's')}",
        pool.first_token_s, "s",
    )  # fmt: skip
    yield Line(
        section, "throughput of a replica", "uncached tokens / prompt alone",
        f"{load.uncached_tokens:,} / {si(pool.prompt_s, 's')}",
        load.uncached_tokens / pool.prompt_s, "tokens/s",
    )  # fmt: skip


def _chunk_numbers(replica: Replica, uncached: int, cached: int, chunk: int) -> str:
    tokens = min(uncached, chunk)
    pairs = tokens * cached + tokens * tokens / 2
    return (
        f"in {-(-uncached // chunk)}; the first: {si(replica.linear_s(tokens, 1), 's')} + "
        f"{si(replica.attention_s(pairs, cached + tokens), 's')} + "
        f"{si(replica.fixed_s(tokens), 's')}"
    )


def _speed_line(section: str, replica: Replica) -> Line:
    per_gpu = replica.flop_per_s / replica.gpus / replica.efficiency.compute
    return Line(
        section, "FLOP/s of a replica", "GPUs x dense FLOP/s x efficiency",
        f"{replica.gpus} x {si(per_gpu, 'FLOP/s')} x {replica.efficiency.compute:g}",
        replica.flop_per_s, "FLOP/s",
    )  # fmt: skip


def _decode_lines(plan: FleetPlan, pool: DecodePool) -> Iterator[Line]:
    load, replica, model = plan.question.load, pool.replica, plan.question.model
    section, context = "decode", load.mean_context_tokens
    yield Line(section, "GPUs per replica", "cheapest size that fits and keeps TPOT", "",
               replica.gpus, "GPUs")  # fmt: skip
    yield Line(
        section, "bandwidth of a replica", "GPUs x bandwidth x efficiency",
        f"{replica.gpus} x {si(replica.gpu.memory_bytes_per_s, 'B/s')} x "
        f"{replica.efficiency.memory:g}", replica.bytes_per_s, "B/s",
    )  # fmt: skip
    yield Line(
        section, "context capacity", "(memory - reserve - weights) x share / KV of a GPU",
        f"({si(replica.gpu.memory_bytes, 'B')} - {si(replica.memory.reserve_bytes, 'B')} - "
        f"{si(model.weight_bytes / replica.gpus, 'B')}) x {replica.memory.kv_share:g} / "
        f"{si(replica.kv_token_bytes_of_gpu, 'B')}", replica.kv_capacity_tokens, "tokens",
    )  # fmt: skip
    yield Line(section, "largest batch", "of TPOT, KV cache and max running the least",
               f"bound by {pool.bound}", pool.max_batch, "streams")  # fmt: skip
    yield Line(section, "replicas", "fewest whose batch stays below the largest", "",
               pool.replicas, "replicas")  # fmt: skip
    yield Line(
        section, "mean batch", "requests/s / replicas x output tokens x step (Little)",
        f"{load.requests_per_s:g} / {pool.replicas} x {load.output_tokens:,} x "
        f"{si(pool.mean_step_s, 's')}", pool.mean_batch, "streams",
    )  # fmt: skip
    quantile = plan.question.targets.quantile
    yield Line(
        section, f"batch, p{100 * quantile:g}", "mean + z x sqrt(mean)",
        f"{pool.mean_batch:.4g} + z x {pool.mean_batch**0.5:.4g}", pool.high_batch, "streams",
    )  # fmt: skip
    batch = pool.high_batch
    yield Line(
        section, f"TPOT, p{100 * quantile:g}", "weights/bandwidth + KV/bandwidth + fixed",
        f"{si(replica.linear_s(batch, batch), 's')} + "
        f"{si(replica.attention_s(batch * context, batch * context), 's')} + "
        f"{si(replica.fixed_s(batch), 's')}", pool.output_token_s, "s",
    )  # fmt: skip
    yield Line(
        section, "throughput of a replica", "mean batch / step",
        f"{pool.mean_batch:.4g} / {si(pool.mean_step_s, 's')}", pool.tokens_per_s, "tokens/s",
    )  # fmt: skip


def _tier_lines(plan: FleetPlan) -> Iterator[Line]:
    each = plan.question.model.kv_token_bytes
    for tier in plan.tiers:
        yield Line(
            "cache tiers of a decode replica", tier.name, "bytes / KV per token",
            f"{si(tier.size_bytes, 'B')} / {si(each, 'B')}; {tier.longest_contexts} contexts of "
            "the longest length", tier.tokens, "tokens",
        )  # fmt: skip


def _price_lines(plan: FleetPlan) -> Iterator[Line]:
    section, load = "price", plan.question.load
    usd = plan.question.gpu.usd_per_hour
    unit = "$/M tokens"
    pools = (
        ("uncached input", plan.prefill.gpus, load.uncached_tokens, plan.prices.input_usd),
        ("output", plan.decode.gpus, load.output_tokens, plan.prices.output_usd),
    )
    for name, gpus, tokens, value in pools:
        yield Line(
            section, name, "GPUs x $/h / tokens/h", f"{gpus} x {usd:g} / "
            f"{si(load.requests_per_s * tokens * 3600)}", value, unit,
        )  # fmt: skip
    yield Line(
        section, "cached input", "KV per token / host bandwidth x $/s (memory is not priced)",
        f"{si(plan.question.model.kv_token_bytes, 'B')} / "
        f"{si(plan.question.gpu.host_bytes_per_s * plan.question.efficiency.link, 'B/s')} x "
        f"{usd / 3600:.3g}", plan.prices.cached_usd, unit,
    )  # fmt: skip
    full = plan.full_prices
    yield Line(section, "uncached input, never idle", "GPU-seconds per token x $/s", "",
               full.input_usd, unit)  # fmt: skip
    yield Line(section, "output, largest batch", "GPU-seconds per token x $/s", "",
               full.output_usd, unit)  # fmt: skip
    yield Line(section, "output : input, never idle", "", "", full.output_to_input, "x")
