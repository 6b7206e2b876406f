"""Blocks to canonical pages and back."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.gather_blocks import (
    gather_blocks_reference,
    gather_blocks_triton,
    scatter_blocks_reference,
    scatter_blocks_triton,
)

CASES = [(0, 1), (0, 33), (3, 40), (16, 16), (15, 2), (31, 33)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize(("start", "tokens"), CASES)
@pytest.mark.parametrize(("heads", "dim", "block"), [(3, 64, 16), (1, 5, 8), (2, 80, 16)])
def test_kernels_equal_references(
    start: int,
    tokens: int,
    heads: int,
    dim: int,
    block: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    blocks = torch.randperm(12, generator=random)[: -(-(start + tokens) // block)]
    cache = torch.randn(2, 2, 12, heads, block, dim, generator=random).to(dtype)
    page = gather_blocks_triton(cache.to(device), blocks.to(device), start, tokens)
    expected = gather_blocks_reference(cache.unbind(1), blocks, start, tokens)
    assert torch.equal(page.cpu(), expected)
    target = torch.randn(cache.shape, generator=random).to(dtype)
    on_device = target.to(device, copy=True)
    scatter_blocks_triton(page, on_device, blocks.to(device), start)
    scatter_blocks_reference(expected, target.unbind(1), blocks, start)
    assert torch.equal(on_device.cpu(), target)


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    cache = torch.zeros(2, 2, 4, 3, 16, 8, device=device)
    blocks = torch.arange(2, device=device)
    page = torch.zeros(2, 2, 3, 20, 8, device=device)
    for bad, sentence in [
        ((page[:, :, :, ::2], cache, blocks, 0), "a page must be contiguous"),
        ((page.half(), cache, blocks, 0), r"page is torch\.float16, the cache torch\.float32"),
        ((page, cache, blocks, 20), "tokens up to 40, blocks hold 32"),
        ((page, cache, blocks.int(), 0), r"block_ids are torch\.int32, int64 needed"),
        ((page, cache[:, :, ::2], blocks, 0), "the cache must be contiguous"),
        ((page[:1], cache, blocks, 0), r"page is .* needed"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            scatter_blocks_triton(*bad)
