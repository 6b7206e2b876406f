"""A trace made larger without copying its bursts: a seeded doubly stochastic resampling.

The trace's rate is smoothed with a kernel of 10 s and multiplied; arrivals are drawn from that
rate (a Cox process), and each takes the lengths of one of the 40 requests around its place in the
trace. Blocks of prompts are renamed by copy, so that prompts repeat within a copy as they did.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from tandem.traces.trace import Trace

NEIGHBOURS: Final = 20


def resample(trace: Trace, factor: float, seed: int, kernel_s: float = 10.0) -> Trace:
    """About `factor` times as many requests over the same time."""
    rng = np.random.default_rng(seed)
    count, copies = len(trace), max(1, round(factor))
    drawn = int(rng.poisson(factor * count))
    origin = rng.integers(count, size=drawn)
    at_s = np.asarray(trace.arrival_s)[origin] + (rng.random(drawn) - 0.5) * kernel_s
    # What falls off an end is reflected: the rate stays that of the trace.
    at_s = np.abs(at_s)
    at_s = np.where(at_s > trace.duration_s, np.maximum(2 * trace.duration_s - at_s, 0.0), at_s)
    origin += rng.integers(-NEIGHBOURS, NEIGHBOURS + 1, size=drawn)
    copy = rng.integers(copies, size=drawn)
    order = np.argsort(at_s, kind="stable")
    at_s, origin, copy = at_s[order], np.clip(origin, 0, count - 1)[order], copy[order]
    blocks = None
    if trace.blocks is not None:
        blocks = [
            tuple(block * copies + which for block in trace.blocks[place])
            for place, which in zip(origin.tolist(), copy.tolist(), strict=True)
        ]
    return Trace(
        name=trace.name,
        arrival_s=at_s.tolist(),
        prompt_tokens=np.asarray(trace.prompt_tokens)[origin].tolist(),
        output_tokens=np.asarray(trace.output_tokens)[origin].tolist(),
        blocks=blocks,
        block_tokens=trace.block_tokens,
        duration_s=trace.duration_s,
    )
