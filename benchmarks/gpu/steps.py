"""Steps of an 8B-shaped model through the engine, from token to token, against the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from tandem_runtime.engine.engine import Engine

from benchmarks.gpu.ceilings import Ceilings, Matmuls
from benchmarks.gpu.idle import between_graphs_us, gpu_events
from benchmarks.gpu.model import RandomModel, SkipsPrompts, StepShape
from benchmarks.gpu.roofline import Points
from benchmarks.gpu.timing import Clock
from benchmarks.report import Target

WARM_STEPS = 4
PREFILL_TOKENS = 2048


@dataclass
class Limits:
    """What steps are compared with."""

    ceilings: Ceilings
    matmuls: Matmuls
    points: Points
    bf16_s: dict[str, float] = field(default_factory=dict)
    """Of steps that other formats are compared with."""


def decoding(model: RandomModel, streams: int, context: int, steps: int) -> Engine:
    """An engine in which so many streams of so much context decode for so many steps more."""
    engine = model.engine(SkipsPrompts(model.runner), max_batch_tokens=streams * context)
    model.add(engine, streams, context, steps + WARM_STEPS + 4)
    for _ in range(WARM_STEPS):
        engine.step()
    assert engine.stats().running == streams, "not all streams run together"
    return engine


def finish(engine: Engine, model: RandomModel) -> None:
    """Nothing of its steps is left on the device."""
    while engine.has_work:
        engine.step()
    if not model.clock.dry:
        torch.cuda.synchronize()


def steps_s(engine: Engine, steps: int) -> float:
    """Median seconds from one step's tokens to the next one's, as their reader sees it."""
    times = []
    last_s = perf_counter()
    for _ in range(steps):
        engine.step()
        now_s = perf_counter()
        times.append(now_s - last_s)
        last_s = now_s
    return median(times)


def decode_s(model: RandomModel, streams: int, context: int) -> tuple[float, StepShape]:
    """Of one step, and what it computes on average."""
    model.clock.check()
    steps = 2 if model.clock.dry else 24
    engine = decoding(model, streams, context, steps)
    seconds = steps_s(engine, steps)
    finish(engine, model)
    middle = context + WARM_STEPS + steps // 2
    return seconds, StepShape([1] * streams, [middle] * streams, streams)


def prefill_s(model: RandomModel) -> tuple[float, StepShape]:
    """Of one prompt, in a step of its own, while others follow."""
    model.clock.check()
    tokens, count = (40, 3) if model.clock.dry else (PREFILL_TOKENS, 12)
    engine = model.engine(model.runner, max_batch_tokens=tokens)
    model.add(engine, count, tokens, 1)
    for _ in range(count // 4):
        engine.step()
    seconds = steps_s(engine, count // 2)
    finish(engine, model)
    return seconds, StepShape([tokens], [tokens], 1)


def decode_targets(limits: Limits, model: RandomModel) -> Iterator[Target]:
    """The grid of batch and context, as far as memory goes."""
    batches, contexts = (1, 8, 32, 64, 128, 256), (256, 1024, 4096)
    grid = [(b, c) for b in batches for c in contexts]
    # Where the bounds are first.
    grid.sort(key=lambda shape: shape not in ((1, 256), (32, 1024), (128, 1024)))
    for streams, context in [(1, 32), (3, 64)] if model.clock.dry else grid:
        if not model.fits(streams, context, 32):
            print(f"# decode step, {streams} x {context}: does not fit", flush=True)
            continue
        seconds, shape = decode_s(model, streams, context)
        name = f"decode step, {streams} x {context}"
        bound_s = model.bound_s(limits.ceilings, limits.matmuls, shape)
        yield Target(f"{name}: ms", seconds * 1e3, None)
        yield Target(f"{name}: time over roofline", seconds / bound_s, 1.15)
        share = model.read_bytes(shape) / seconds / limits.ceilings.bytes_per_s
        bound = 0.80 if streams == 1 else None
        yield Target(f"{name}: share of bandwidth", share, bound, "at least")
        limits.points.add(name, model.flop(shape), model.read_bytes(shape), seconds)
        if streams == 1:
            limits.bf16_s.setdefault("decode", seconds)


def prefill_target(limits: Limits, model: RandomModel) -> Target:
    """Prompts of 2048 tokens: multiplications over what the GPU could do."""
    seconds, shape = prefill_s(model)
    limits.bf16_s["prefill"] = seconds
    limits.points.add("prefill step", model.flop(shape), model.read_bytes(shape), seconds)
    share = model.flop(shape) / seconds / limits.ceilings.matmul_flop_per_s
    tokens = sum(shape.query_tokens)
    return Target(f"prefill of {tokens}: share of the matmul ceiling", share, 0.70, "at least")


def idle_target(model: RandomModel) -> Target:
    """How long the GPU does nothing between two decode steps of 32 x 1024, by a trace."""
    model.clock.check()
    streams, context, steps = (2, 32, 3) if model.clock.dry else (32, 1024, 12)
    engine = decoding(model, streams, context, steps)
    events = gpu_events(lambda: steps_s(engine, steps))
    finish(engine, model)
    # A dry run has no GPU whose events there could be.
    idle_us = 0.0 if model.clock.dry else between_graphs_us(events)
    return Target("GPU idle between decode steps, us", idle_us, 50)


def fp8_targets(clock: Clock, limits: Limits, dtype: torch.dtype) -> Iterator[Target]:
    """fp8 weights over bfloat16 ones, where this version has them."""
    try:
        model = RandomModel(clock, dtype, max_running=8, quantization="fp8")
    except (ValueError, KeyError) as error:
        print(f"# fp8 weights: {error}", flush=True)
        return
    for name, seconds, bound in (
        ("decode", decode_s(model, 1, 32 if clock.dry else 256)[0], 1.6),
        ("prefill", prefill_s(model)[0], 1.4),
    ):
        if name in limits.bf16_s:
            ratio = limits.bf16_s[name] / seconds
            yield Target(f"fp8 weights, {name}: bfloat16's time over it", ratio, bound, "at least")
