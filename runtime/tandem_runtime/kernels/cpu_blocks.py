"""gather_blocks.py's formulas in the CPU's layout of the pool (cpu_attention.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_runtime.kernels.cpu_attention import pack, unpack, whole_blocks
from tandem_runtime.kernels.gather_blocks import (
    gather_blocks_reference,
    scatter_blocks_reference,
)


def gather_blocks_cpu(cache: Tensor, block_ids: Tensor, start: int, tokens: int) -> Tensor:
    """The canonical page of tokens [start, start + tokens): of whole blocks in one pass."""
    layers, _, _, heads, size, dim = cache.shape
    if start % size or tokens % size:
        keys, values = unpack(cache.index_select(2, block_ids)).unbind(1)
        ids = torch.arange(len(block_ids))
        return gather_blocks_reference((keys, values), ids, start, tokens)
    page = cache.new_empty((layers, 2, heads, tokens, dim))
    blocks = block_ids[start // size :].tolist()
    for ours, pool in whole_blocks(page, cache):
        for place in range(tokens // size):
            ours[:, place].copy_(pool[:, blocks[place]])
    return page


def scatter_blocks_cpu(page: Tensor, cache: Tensor, block_ids: Tensor, start: int) -> None:
    """The inverse. Of a page that ends inside of a block, what else is in it is kept."""
    size, tokens = cache.shape[4], page.shape[3]
    if start % size or tokens % size:
        plain = unpack(cache.index_select(2, block_ids))
        ids = torch.arange(len(block_ids))
        scatter_blocks_reference(page, (plain[:, 0], plain[:, 1]), ids, start)
        # As bytes: torch copies no fp8 by index.
        cache.view(torch.uint8).index_copy_(2, block_ids, pack(plain).view(torch.uint8))
        return
    blocks = block_ids[start // size :].tolist()
    for ours, pool in whole_blocks(page, cache):
        for place in range(tokens // size):
            pool[:, blocks[place]].copy_(ours[:, place])
