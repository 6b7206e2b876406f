"""Where the time of a decode step goes, operator by operator, beside what the machine allows.

Operators are counted in steps that Python calls; "replayed" is a step as the engine runs it, whose
layers are recorded and computed without Python.

On one thread and in its processor time, so that neighbours count less. Bounds: weights and KV read
once at the measured bandwidth, or products at the measured rate of torch's, whichever takes longer.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tandem_runtime import kernels
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine import runner
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.protocol import Sampling

from benchmarks.fleet import MODEL_URI

STREAMS: Final = (1, 16, 32)
CONTEXT_TOKENS: Final = 320
STEPS: Final = 24
PROMPT_ROWS: Final = 2048
OPERATORS: Final = {
    "linear_cpu": "linears and head",
    "paged_attention": "attention",
    "rms_norm": "norms",
    "rope": "rope",
    "store_kv": "KV store",
    "silu_mul": "activation",
}
REPLAYED: Final = "step, replayed"
LAYER_WEIGHTS, HEAD_WEIGHTS = 30 * 3_538_944, 49152 * 576
KV_BYTES_PER_TOKEN, ATTENTION_FLOP_PER_TOKEN = 30 * 2 * 3 * 64 * 2, 30 * 9 * 64 * 4


@dataclass(frozen=True)
class Ceilings:
    """Of one thread."""

    bytes_per_s: float
    flop_per_s: float

    def bound_s(self, read_bytes: float, flop: float) -> float:
        return max(read_bytes / self.bytes_per_s, flop / self.flop_per_s)


def ceilings() -> Ceilings:
    """The best of several tries: neighbours only take away."""
    torch.set_num_threads(1)
    memory = np.ones(1 << 26, np.float32)
    a, b = torch.ones(512, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    read_s = min(_took_s(lambda: memory.max()) for _ in range(8))
    product_s = min(_took_s(lambda: torch.mm(a, b)) for _ in range(40))
    return Ceilings(memory.nbytes / read_s, 2 * 512 * 1024 * 1024 / product_s)


def _took_s(work: Callable[[], object]) -> float:
    begun_s = time.thread_time()
    work()
    return time.thread_time() - begun_s


@contextmanager
def timed_operators() -> Iterator[dict[str, float]]:
    """Seconds of each operator, counted where the model calls it."""
    spent: dict[str, float] = defaultdict(float)
    places = [(kernels, name, label) for name, label in OPERATORS.items()]
    places.append((runner, "choose", "sampling"))
    originals = [getattr(module, name) for module, name, _ in places]

    def timed(run: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            begun_s = time.thread_time()
            result = run(*args, **named)
            spent[label] += time.thread_time() - begun_s
            return result

        return call

    for (module, name, label), original in zip(places, originals, strict=True):
        setattr(module, name, timed(original, label))
    try:
        yield spent
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def step_times(engine: Engine, streams: int) -> dict[str, float]:
    """Median seconds of a decode step: in all, and of each operator."""
    chance = random.Random(streams)
    sampling = Sampling(max_tokens=STEPS + 8, temperature=0.0, ignore_eos=True)
    for index in range(streams):
        ids = [chance.randrange(1000, 40_000) for _ in range(CONTEXT_TOKENS - STEPS // 2)]
        engine.add(Request(str(index), ids, sampling))
    found: dict[str, list[float]] = defaultdict(list)
    while engine.has_work:
        with timed_operators() as spent:
            begun_s = time.thread_time()
            output = engine.step()
            whole_s = time.thread_time() - begun_s
        if output.batch_tokens == streams == sum(1 for s in output.streams if s.token):
            parts = {label: spent[label] for label in (*OPERATORS.values(), "sampling")}
            parts["host"] = whole_s - sum(parts.values())
            for label, took_s in {**parts, "step": whole_s}.items():
                found[label].append(took_s)
    return {label: median(values) for label, values in found.items()}


def bounds(rows: int, machine: Ceilings) -> dict[str, float]:
    """Seconds that the machine allows for a step of so many decodes."""
    weights = LAYER_WEIGHTS + HEAD_WEIGHTS
    tokens = rows * CONTEXT_TOKENS
    found = {
        "linears and head": machine.bound_s(2 * weights, 2 * weights * rows),
        "attention": machine.bound_s(
            tokens * KV_BYTES_PER_TOKEN, tokens * ATTENTION_FLOP_PER_TOKEN
        ),
    }
    whole_s = sum(found.values())
    return {**found, "step": whole_s, REPLAYED: whole_s}


def measure() -> dict[str, Any]:
    """All of it, printed as a table and returned in milliseconds."""
    machine = ceilings()
    # Prompts in few steps, so that all streams decode together before the first one ends.
    config = EngineConfig(
        MODEL_URI, dtype="bfloat16", prefix_caching=False, max_batch_tokens=PROMPT_ROWS
    )
    engine = build_engine(config)
    runner: Any = engine._runner
    recorded, runner._graphs = runner._graphs, None
    times = {streams: step_times(engine, streams) for streams in STREAMS}
    runner._graphs = recorded
    for streams in STREAMS:
        times[streams][REPLAYED] = step_times(engine, streams)["step"]
    table = Table(title=f"a decode step at {CONTEXT_TOKENS} tokens of context, one thread, ms")
    table.add_column("operator")
    for streams in STREAMS:
        table.add_column(f"{streams} streams", justify="right")
        table.add_column("bound", justify="right")
    for label in times[STREAMS[0]]:
        cells = []
        for streams in STREAMS:
            bound_s = bounds(streams, machine).get(label)
            cells += [f"{1e3 * times[streams][label]:.2f}"]
            cells += [f"{1e3 * bound_s:.2f}" if bound_s is not None else ""]
        table.add_row(label, *cells)
    Console().print(table)
    print(
        f"one thread: reads {machine.bytes_per_s / 1e9:.0f} GB/s, "
        f"multiplies bfloat16 at {machine.flop_per_s / 1e9:.0f} GFLOP/s (torch)"
    )
    return {
        "read_gb_per_s": round(machine.bytes_per_s / 1e9, 1),
        "bf16_gflop_per_s": round(machine.flop_per_s / 1e9, 1),
        "step_ms": {
            str(streams): {
                label: {
                    "ms": round(1e3 * took_s, 3),
                    "bound_ms": round(1e3 * bound_s, 3)
                    if (bound_s := bounds(streams, machine).get(label)) is not None
                    else None,
                }
                for label, took_s in of_streams.items()
            }
            for streams, of_streams in times.items()
        },
    }
