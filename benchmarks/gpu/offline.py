"""1,000 requests at once, with a trace's lengths, against the sum of their steps' rooflines."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Final

from tandem_runtime.engine.sequence import Request
from tandem_runtime.protocol import Sampling

from benchmarks.gpu.model import RandomModel, Watched
from benchmarks.gpu.steps import Limits
from benchmarks.report import Target

REQUESTS: Final = 1000
BATCH_TOKENS: Final = 2048
SYNTHETIC: Final = ((1020, 0.50), (129, 0.99))
"""Median and sigma of lognormal prompts and outputs: medians and means are those of Azure's
conversations of 2023."""
COLUMNS: Final = (
    ("input_tokens", "output_tokens"),
    ("ContextTokens", "GeneratedTokens"),
    ("input_length", "output_length"),
    ("Request tokens", "Response tokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
)
"""Of prompt and output in the traces' own formats: this project's CSV, Azure, Mooncake and Qwen,
BurstGPT, Vidur."""
Lengths = tuple[int, int]


def read_lengths(path: Path, count: int) -> list[Lengths]:
    """Prompt and output tokens of the first requests of a trace: CSV or JSON lines, maybe gzipped.

    Raises:
        ValueError: the columns are of no known format.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        jsonl = ".jsonl" in path.suffixes
        rows = (json.loads(line) for line in lines) if jsonl else csv.DictReader(lines)
        lengths = []
        for row in rows:
            names = next((pair for pair in COLUMNS if pair[0] in row and pair[1] in row), None)
            if names is None:
                raise ValueError(
                    f"{path}: none of {', '.join(sorted(row))} says how long a request is; "
                    f"name columns as one of {COLUMNS}"
                )
            lengths.append((int(float(row[names[0]])), int(float(row[names[1]]))))
            if len(lengths) == count:
                break
    return lengths


def synthetic_lengths(count: int) -> list[Lengths]:
    """Without a trace; seeded."""
    draw = random.Random(0)

    def length(median: int, sigma: float) -> int:
        return max(1, round(median * draw.lognormvariate(0, sigma)))

    return [(length(*SYNTHETIC[0]), length(*SYNTHETIC[1])) for _ in range(count)]


def offline_targets(limits: Limits, model: RandomModel, traces: list[Path]) -> Iterator[Target]:
    """Each trace, cut to what the model's context holds."""
    count = 6 if model.clock.dry else REQUESTS
    for name, lengths in [
        *((path.name.partition(".")[0], read_lengths(path, count)) for path in traces),
        *([("synthetic", synthetic_lengths(count))] if not traces else []),
    ]:
        yield from _run(limits, model, name, lengths)


def _run(limits: Limits, model: RandomModel, name: str, lengths: list[Lengths]) -> Iterator[Target]:
    watched = Watched(model.runner)
    budget = 32 if model.clock.dry else BATCH_TOKENS
    engine = model.engine(watched, max_batch_tokens=budget)
    longest = 40 if model.clock.dry else model.config.context_tokens
    ids, draw = range(model.config.vocab_size), random.Random(0)
    generated = 0
    for index, (prompt, output) in enumerate(lengths):
        output = min(max(output, 1), longest // 2)
        known = draw.choices(ids, k=min(max(prompt, 1), longest - output))
        engine.add(Request(f"{index}", known, Sampling(output, seed=index)))
    begun_s = perf_counter()
    while engine.has_work:
        model.clock.check()
        generated += sum(s.token is not None for s in engine.step().streams)
    seconds = perf_counter() - begun_s
    bound_s = sum(model.bound_s(limits.ceilings, limits.matmuls, shape) for shape in watched.shapes)
    title = f"{len(lengths)} requests offline, {name}"
    yield Target(f"{title}: output tokens/s", generated / seconds, None, "at least")
    preemptions = engine.stats().preemptions
    yield Target(f"{title}: preemptions", float(preemptions), None)
    yield Target(f"{title}: share of roofline", bound_s / seconds, 0.75, "at least")
