"""A step's rows cut into parts of about equal cost, one for each thread of a CPU.

A part is a batch of its own, over the same cache. Where a cut falls inside a sequence, the later
part's attention needs the KV that the earlier one stores in the same layer, so it waits for it.
Which part computes a row changes nothing in the row's bits.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

from tandem_runtime.engine.batch import Batch

ROW_TOKENS: Final = 1024
"""A row's linear layers cost about as much as its attention to so many tokens."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a step."""

    batch: Batch
    continues: bool
    """Whether its first row goes on with the sequence that the part before ends with."""


def split(batch: Batch, count: int) -> list[Part]:
    """At most `count` parts, none empty, in the order of the rows."""
    if min(count, batch.rows) == 1:
        return [Part(batch, continues=False)]
    costs = list(accumulate(ROW_TOKENS + position for position in batch.positions))
    ends = {bisect_left(costs, costs[-1] * i / count) + 1 for i in range(1, count + 1)}
    parts, first = [], 0
    for end in sorted(ends):
        parts.append(_part(batch, first, end))
        first = end
    return parts


def _part(batch: Batch, first: int, end: int) -> Part:
    """Rows [first, end)."""
    queries, contexts, tables = [], [], []
    row, continues = 0, False
    for count, context, table in zip(
        batch.query_tokens, batch.context_tokens, batch.block_tables, strict=True
    ):
        begin, stop = max(row, first), min(row + count, end)
        if begin < stop:
            queries.append(stop - begin)
            contexts.append(context - (row + count - stop))
            tables.append(table)
            continues = continues or row < first
        row += count
    own = Batch(
        token_ids=batch.token_ids[first:end],
        positions=batch.positions[first:end],
        slots=batch.slots[first:end],
        query_tokens=queries,
        context_tokens=contexts,
        block_tables=tables,
        samples=[replace(s, row=s.row - first) for s in batch.samples if first <= s.row < end],
    )
    return Part(own, continues)
