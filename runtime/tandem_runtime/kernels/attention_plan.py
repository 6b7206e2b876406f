"""What attention needs to know of a step, laid out once and used by every layer.

Rows of a step are the tokens of its sequences, one sequence after the other; sequences of one row
come first. Nothing here depends on anything but the sequences themselves, so neither does the order
in which attention sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SPLIT_TOKENS: Final = 256
"""Context of one piece of GPU decode work. The size is fixed, never the number of splits."""


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

    query_start: Tensor
    """[sequences + 1] first row of each."""
    context: Tensor
    """[sequences]"""
    block_tables: Tensor
    """[sequences, blocks] padded with the scrap block."""
    splits: Tensor
    """[n, 2] decode: sequence and split; row i's partial result is the i-th."""
    split_start: Tensor
    """[decodes + 1] first split of each decode."""
    tiles: Tensor
    """[m, 2] prefill: sequence and the tile's first row within the chunk."""


def plan_gpu(step: Step, tile_tokens: int, device: torch.device) -> GpuWork:
    """Work lists for the kernels.

    Args:
        step: what to lay out.
        tile_tokens: rows of a chunk in one prefill tile.
        device: where the lists go.
    """
    query_start, split_start = [0], [0]
    splits: list[int] = []
    tiles: list[int] = []
    decodes = step.decodes
    for sequence, queries in enumerate(step.query_tokens):
        query_start.append(query_start[-1] + queries)
        if sequence < decodes:
            for split in range(-(-step.context_tokens[sequence] // SPLIT_TOKENS)):
                splits += (sequence, split)
            split_start.append(len(splits) // 2)
        else:
            for row in range(0, queries, tile_tokens):
                tiles += (sequence, row)
    width = max(len(table) for table in step.block_tables)
    tables = [table + [0] * (width - len(table)) for table in step.block_tables]

    def on_device(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

    return GpuWork(
        query_start=on_device(query_start),
        context=on_device(step.context_tokens),
        block_tables=on_device(tables),
        splits=on_device(splits).view(-1, 2),
        split_start=on_device(split_start),
        tiles=on_device(tiles).view(-1, 2),
    )
