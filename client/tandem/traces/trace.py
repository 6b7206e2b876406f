"""A trace: when requests came, how long prompts and answers were, which prompts began alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class TraceError(ValueError):
    """A trace that cannot be read or made; the message is a sentence with the line's number."""


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; times since the first moment of the trace."""

    name: str
    arrival_s: Sequence[float]
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]
    blocks: Sequence[tuple[int, ...]] | None = None
    """Of each prompt: ids of its leading blocks; equal ids are equal text behind equal text."""
    block_tokens: int = 0
    duration_s: float = 0.0
    notes: tuple[str, ...] = ()
    """What was changed in reading, for people."""

    def __len__(self) -> int:
        return len(self.arrival_s)


def cut(
    trace: Trace, *, start_s: float = 0.0, length_s: float | None = None, speed: float = 1.0
) -> Trace:
    """A stretch of the trace, replayed `speed` times as fast. Raises TraceError."""
    if not 0 < speed < math.inf:
        raise TraceError(f"a speed of {speed:g}: give more than 0")
    end_s = math.inf if length_s is None else start_s + length_s
    kept = [i for i, at_s in enumerate(trace.arrival_s) if start_s <= at_s < end_s]
    if not kept:
        raise TraceError(
            f"{trace.name} has no request from {start_s:g} s to {end_s:g} s: it is "
            f"{trace.duration_s:g} s long"
        )
    return Trace(
        name=trace.name,
        arrival_s=[(trace.arrival_s[i] - start_s) / speed for i in kept],
        prompt_tokens=[trace.prompt_tokens[i] for i in kept],
        output_tokens=[trace.output_tokens[i] for i in kept],
        blocks=None if trace.blocks is None else [trace.blocks[i] for i in kept],
        block_tokens=trace.block_tokens,
        duration_s=(min(end_s, trace.duration_s) - start_s) / speed,
        notes=trace.notes,
    )


def in_order(trace: Trace, move: Callable[[float], float]) -> Trace:
    """The trace with each arrival moved, sorted again."""
    moved = [move(at_s) for at_s in trace.arrival_s]
    order = sorted(range(len(moved)), key=moved.__getitem__)
    return Trace(
        name=trace.name,
        arrival_s=[moved[i] for i in order],
        prompt_tokens=[trace.prompt_tokens[i] for i in order],
        output_tokens=[trace.output_tokens[i] for i in order],
        blocks=None if trace.blocks is None else [trace.blocks[i] for i in order],
        block_tokens=trace.block_tokens,
        duration_s=max(trace.duration_s, max(moved, default=0.0)),
        notes=trace.notes,
    )
