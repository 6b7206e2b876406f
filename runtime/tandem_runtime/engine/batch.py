"""From a plan of what to compute to the index lists that the runner turns into tensors.

Rows are the tokens of one step, sequence after sequence; sequences of one row come first, so that a
runner can treat them (decode) apart from longer ones (prefill chunks).
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tandem_runtime.engine.sequence import Sequence
from tandem_runtime.protocol import Sampling

if TYPE_CHECKING:
    from tandem_runtime.engine.grammar import Grammar


@dataclass
class Work:
    """Compute known tokens [start, start + count) of a sequence; all earlier ones are computed, or
    are by the step in flight."""

    sequence: Sequence
    start: int
    count: int
    samples: bool = field(init=False)
    """Whether the last of these tokens is the last known one, so that the next is chosen."""

    def __post_init__(self) -> None:
        self.samples = self.start + self.count == self.sequence.known_tokens


@dataclass(frozen=True)
class SampleRow:
    """How to choose the token that follows one row."""

    row: int
    """Index into the batch's rows."""
    position: int
    """Of the token to choose; with the seed, what its noise depends on."""
    sampling: Sampling
    adjusted: bool = False
    """Whether the logits are changed first (`sampling.adjusts_logits`)."""
    prompt_tokens: int = 0
    token_ids: Ids[int] = ()
    """The stream's, at least as far as `position` where `sampling.needs_history`."""
    grammar: Grammar | None = None
    """Follows the output where `sampling.grammar` is set."""


@dataclass(frozen=True)
class Batch:
    """One step, as plain lists."""

    token_ids: list[int]
    """[rows]. Negative, -1 - i: what sample i of the step before chose; the host does not know."""
    positions: list[int]
    """[rows]"""
    slots: list[int]
    """[rows] where each row's KV goes: block id * block_tokens + offset."""
    query_tokens: list[int]
    """[sequences] rows of each."""
    context_tokens: list[int]
    """[sequences] tokens of each that its last row attends to, that row's own included."""
    block_tables: list[list[int]]
    """[sequences][blocks] covering `context_tokens`."""
    samples: list[SampleRow]

    @property
    def rows(self) -> int:
        return len(self.token_ids)

    @property
    def decodes(self) -> int:
        """Leading sequences that have one row."""
        return sum(1 for count in self.query_tokens if count == 1)


def build_batch(works: list[Work], block_tokens: int) -> tuple[Batch, list[Work]]:
    """The lists for `works`, and the works in the order in which they were laid out."""
    ordered = sorted(works, key=lambda work: work.count > 1)
    batch = Batch([], [], [], [], [], [], [])
    for work in ordered:
        sequence, end = work.sequence, work.start + work.count
        batch.token_ids.extend(sequence.token_ids[work.start : end])
        if end > len(sequence.token_ids):
            batch.token_ids.append(-1 - sequence.pending_sample)
        batch.positions.extend(range(work.start, end))
        batch.slots.extend(
            sequence.block_ids[position // block_tokens] * block_tokens + position % block_tokens
            for position in range(work.start, end)
        )
        batch.query_tokens.append(work.count)
        batch.context_tokens.append(end)
        batch.block_tables.append(sequence.block_ids[: -(-end // block_tokens)])
        if work.samples:
            batch.samples.append(_sample_row(sequence, batch.rows - 1))
    return batch, ordered


def _sample_row(sequence: Sequence, row: int) -> SampleRow:
    request = sequence.request
    return SampleRow(
        row=row,
        position=sequence.known_tokens,
        sampling=request.sampling,
        adjusted=sequence.adjusts_logits,
        prompt_tokens=sequence.prompt_tokens,
        token_ids=sequence.token_ids,
        grammar=request.grammar,
    )
