"""What attention needs to know of a step, laid out once and used by every layer.

Rows of a step are the tokens of its sequences, one sequence after the other; sequences of one row
come first. Nothing here depends on anything but the sequences themselves, so neither does the order
in which attention sums.

On a GPU a step's integers travel as one int32 buffer, so that one copy brings them there:

    head (the caller's) | split_start | splits | tiles | block ids

each part begins at a multiple of four. Where the first parts begin follows from their lengths
alone, and who needs block ids finds their place in its item: a CUDA graph reads any step from one
buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPLIT_TOKENS: Final = 256
"""Context of one piece of GPU decode work. The size is fixed, never the number of splits."""
ITEM: Final = 4
"""Integers of a split or tile."""
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Step:
    """The sequences of a step, as lists."""

    query_tokens: list[int]
    """[sequences] rows of each."""
    context_tokens: list[int]
    """[sequences] tokens that the last row of each sees, its own included."""
    block_tables: list[list[int]]
    """[sequences][blocks] that hold these tokens, and none beyond them."""
    block_tokens: int

    @property
    def decodes(self) -> int:
        """Leading sequences of one row."""
        return sum(1 for count in self.query_tokens if count == 1)


@dataclass(frozen=True)
class GpuWork:
    """Lists of equal pieces, int32 on the device: one launch serves any raggedness."""

    ints: Tensor
    """The buffer that the others lie in, and block ids too."""
    split_start: Tensor
    """[decodes + 1] first split of each decode; the last entry counts them all."""
    splits: Tensor
    """[at least that many, 4] decode: row, first context token, end, place of the first's block id.
    The i-th split's result is the i-th partial one."""
    tiles: Tensor
    """[m, 4] prefill: first row, rows, tokens that the first row sees, place of token 0's block id.
    """


@dataclass(frozen=True)
class HostWork:
    """The same on the host; places count from the first block id."""

    split_start: Ints
    splits: Ints
    tiles: Ints
    block_ids: Ints

    def packed(self, head: Ints) -> Ints:
        """The whole buffer."""
        parts = [head, self.split_start, self.splits, self.tiles, self.block_ids]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + _aligned(part.size))
        buffer = np.zeros(starts[-1], np.int32)
        for start, part in zip(starts, parts, strict=False):
            buffer[start : start + part.size] = part.ravel()
        for start, items in zip(starts[2:4], (self.splits, self.tiles), strict=True):
            buffer[start : start + items.size].reshape(-1, ITEM)[:, 3] += starts[4]
        return buffer


def _aligned(count: int) -> int:
    return -(-count // ITEM) * ITEM


def work_at(ints: Tensor, head: int, decodes: int, splits: int, tiles: int) -> GpuWork:
    """The lists in a buffer whose caller's part has `head` integers."""
    start = _aligned(head)
    items = start + _aligned(decodes + 1)
    after = items + splits * ITEM
    return GpuWork(
        ints=ints,
        split_start=ints[start : start + decodes + 1],
        splits=ints[items:after].view(splits, ITEM),
        tiles=ints[after : after + tiles * ITEM].view(tiles, ITEM),
    )


def plan_gpu(step: Step, tile_tokens: int, *, decodes: int | None = None) -> HostWork:
    """Work lists for the kernels.

    Args:
        step: what to lay out.
        tile_tokens: tokens of a chunk in one prefill tile.
        decodes: rows of decodes; those beyond the step's are padding, which attends to nothing.
    """
    own = step.decodes
    context = np.array(step.context_tokens, np.int32)
    queries = np.array(step.query_tokens, np.int32)
    widths = [len(table) for table in step.block_tables]
    table_at = np.cumsum([0, *widths], dtype=np.int32)
    counts = -(-context[:own] // SPLIT_TOKENS)
    padding = np.zeros((own if decodes is None else decodes) - own, np.int32)
    split_start = np.cumsum(np.concatenate(([0], counts, padding)), dtype=np.int32)
    row = np.repeat(np.arange(own, dtype=np.int32), counts)
    begin = (np.arange(len(row), dtype=np.int32) - split_start[row]) * SPLIT_TOKENS
    end = np.minimum(begin + SPLIT_TOKENS, context[row])
    splits = np.stack((row, begin, end, table_at[row] + begin // step.block_tokens), axis=1)
    tiles, first_row = [], own
    for index in range(own, len(queries)):
        count, seen = int(queries[index]), int(context[index] - queries[index])
        for first in range(0, count, tile_tokens):
            rows = min(tile_tokens, count - first)
            tiles.append((first_row + first, rows, seen + first + 1, int(table_at[index])))
        first_row += count
    # Those with most to do begin first.
    tiles.sort(key=lambda tile: -tile[2])
    return HostWork(
        split_start=split_start,
        splits=splits,
        tiles=np.array(tiles, np.int32).reshape(-1, ITEM),
        block_ids=np.fromiter(chain.from_iterable(step.block_tables), np.int32, sum(widths)),
    )


def upload(work: HostWork, device: torch.device, head: Ints | None = None) -> GpuWork:
    """The lists in a new buffer on the device, by a copy that the host does not wait for."""
    head = np.zeros(0, np.int32) if head is None else head
    buffer = to_device(work.packed(head), device)
    decodes = len(work.split_start) - 1
    return work_at(buffer, len(head), decodes, len(work.splits), len(work.tiles))


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy that the host does not wait for: torch keeps the pinned memory, which it has a stock
    of, until the copy is done."""
    return staged(values, device).to(device, non_blocking=True)


def staged(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """On the host, where a copy to the device may start from at once and need not be waited for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor
