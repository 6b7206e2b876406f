"""Between the pool's blocks and canonical pages, for handoff and for slower tiers.

    page[layer, k|v, head, t] = cache[layer, k|v, blocks[(start + t) // T], head, (start + t) % T]

cache: [layers, 2, blocks, kv heads, T, D]; page: [layers, 2, kv heads, tokens, D], contiguous;
block_ids: [n] int64, those of one sequence from its first token on. Scatter is the inverse.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def gather_blocks_reference(
    planes: tuple[Tensor, Tensor], block_ids: Tensor, start: int, tokens: int
) -> Tensor:
    """The canonical page of tokens [start, start + tokens).

    planes: keys and values, two views [layers, blocks, kv heads, T, D] of the cache.
    """
    size = planes[0].shape[3]
    ids = block_ids[start // size : -(-(start + tokens) // size)]
    # index_select would copy the whole plane first where its keys are stored transposed.
    content = torch.stack([plane[:, ids].transpose(1, 2) for plane in planes], 1)
    return content.flatten(3, 4)[:, :, :, start % size :][:, :, :, :tokens].contiguous()


def scatter_blocks_reference(
    page: Tensor, planes: tuple[Tensor, Tensor], block_ids: Tensor, start: int
) -> None:
    """Write a canonical page into the pool, from token `start` on; planes as above."""
    size, tokens = planes[0].shape[3], page.shape[3]
    first = start // size
    ids = block_ids[first : -(-(start + tokens) // size)]
    if start % size or tokens % size:
        old = gather_blocks_reference(planes, block_ids, first * size, len(ids) * size)
        old[:, :, :, start % size :][:, :, :, :tokens] = page
        page = old
    for plane, content in zip(planes, page.unbind(1), strict=True):
        plane[:, ids] = content.view(*content.shape[:2], len(ids), size, -1).transpose(1, 2)


# Specialised on these it would be compiled again, between two steps, for the first odd span.
@triton.jit(do_not_specialize=["start", "tokens"])
def _move_kernel(
    cache, page, block_ids, start, tokens, heads, dim, plane_stride, block_stride, head_stride,
    TO_CACHE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    plane, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (token < tokens)[:, None] & (column < dim)
    position = start + token
    block = tl.load(block_ids + position // BLOCK_TOKENS, mask=token < tokens, other=0)
    slot = block * block_stride + (position % BLOCK_TOKENS) * dim
    in_cache = cache + plane * plane_stride + head * head_stride + slot[:, None] + column
    in_page = page + ((plane * heads + head) * tokens + token)[:, None] * dim + column
    if TO_CACHE:
        tl.store(in_cache, tl.load(in_page, mask=inside), mask=inside)
    else:
        tl.store(in_page, tl.load(in_cache, mask=inside), mask=inside)


def _move(page: Tensor, cache: Tensor, block_ids: Tensor, start: int, *, to_cache: bool) -> None:
    layers, _, _, heads, block_tokens, dim = cache.shape
    tokens, tile = page.shape[3], 32
    assert cache.is_contiguous(), f"the cache must be contiguous, got strides {cache.stride()}"
    assert page.is_contiguous(), f"a page must be contiguous, got strides {page.stride()}"
    expected = (layers, 2, heads, tokens, dim)
    assert tuple(page.shape) == expected, f"page is {tuple(page.shape)}, {expected} needed"
    assert page.dtype == cache.dtype, f"page is {page.dtype}, the cache {cache.dtype}"
    assert block_ids.dtype == torch.int64, f"block_ids are {block_ids.dtype}, int64 needed"
    covered = block_ids.shape[0] * block_tokens
    assert start + tokens <= covered, f"tokens up to {start + tokens}, blocks hold {covered}"
    _move_kernel[(layers * 2, heads, triton.cdiv(tokens, tile))](
        cache,
        page,
        block_ids,
        start,
        tokens,
        heads,
        dim,
        cache.stride(1),
        cache.stride(2),
        cache.stride(3),
        TO_CACHE=to_cache,
        BLOCK_TOKENS=block_tokens,
        TILE=tile,
        BLOCK_DIM=triton.next_power_of_2(dim),
    )


def gather_blocks_triton(cache: Tensor, block_ids: Tensor, start: int, tokens: int) -> Tensor:
    """The same by one program for 32 tokens of a plane and head."""
    layers, _, _, heads, _, dim = cache.shape
    page = torch.empty((layers, 2, heads, tokens, dim), dtype=cache.dtype, device=cache.device)
    _move(page, cache, block_ids, start, to_cache=False)
    return page


def scatter_blocks_triton(page: Tensor, cache: Tensor, block_ids: Tensor, start: int) -> None:
    """The same by one program for 32 tokens of a plane and head."""
    _move(page, cache, block_ids, start, to_cache=True)
