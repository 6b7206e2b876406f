"""A trace made larger without copying its bursts: a seeded doubly stochastic resampling.

The trace's rate is smoothed with a kernel of 10 s and multiplied; arrivals are drawn from that
rate (a Cox process), and each takes the lengths of one of the 40 requests around its place in the
trace. Blocks of prompts are renamed by copy, so that prompts repeat within a copy as they did.
"""

from __future__ import annotations

import math
from random import Random
from typing import Final

from tandem.traces.trace import Trace

NEIGHBOURS: Final = 20


def resample(trace: Trace, factor: float, seed: int, kernel_s: float = 10.0) -> Trace:
    """About `factor` times as many requests over the same time."""
    rng = Random(seed)
    count, copies = len(trace), max(1, round(factor))
    drawn = []
    for _ in range(_poisson(factor * count, rng)):
        origin = rng.randrange(count)
        at_s = trace.arrival_s[origin] + (rng.random() - 0.5) * kernel_s
        # What falls off an end is reflected: the rate stays that of the trace.
        at_s = abs(at_s)
        if at_s > trace.duration_s:
            at_s = max(2 * trace.duration_s - at_s, 0.0)
        neighbour = min(max(origin + rng.randint(-NEIGHBOURS, NEIGHBOURS), 0), count - 1)
        drawn.append((at_s, neighbour, rng.randrange(copies)))
    drawn.sort()
    blocks = None
    if trace.blocks is not None:
        blocks = [
            tuple(block * copies + copy for block in trace.blocks[origin])
            for _, origin, copy in drawn
        ]
    return Trace(
        name=trace.name,
        arrival_s=[at_s for at_s, _, _ in drawn],
        prompt_tokens=[trace.prompt_tokens[origin] for _, origin, _ in drawn],
        output_tokens=[trace.output_tokens[origin] for _, origin, _ in drawn],
        blocks=blocks,
        block_tokens=trace.block_tokens,
        duration_s=trace.duration_s,
    )


def _poisson(mean: float, rng: Random) -> int:
    """Normal for the large means of a trace."""
    return max(0, round(rng.gauss(mean, math.sqrt(mean))))
