"""Causal attention over the paged cache, for prefill chunks and for decode, with grouped queries.

    o[row, h] = sum_t softmax_t(scale * q[row, h] . K[t, h // G]) V[t, h // G],  t <= row's position

q, o: [rows, heads, D]; cache: one layer's [2, blocks, kv heads, T, D]; G = heads / kv heads. The
step's own keys and values are stored already. A kv head's G query heads are rows of one matrix
product ("the group is packed"), so keys and values are read once for all of them.

The order of summation is a function of the sequence alone, never of the batch: decode in splits of
fixed size, merged first to last (flash-decoding); prefill in tiles, first to last, with the online
softmax of FlashAttention-2. The reference is cpu_attention.py.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_runtime.kernels.attention_plan import (
    SPLIT_TOKENS,
    GpuWork,
)

TILE_TOKENS: Final = 64
"""Context tokens of one step of the GPU kernels."""
QUERY_ROWS: Final = 64
"""Query rows (tokens x group) of a prefill tile."""


# -- kernels ---------------------------------------------------------------------------------------
@triton.jit
def _attend_range(
    q, keys, values, table, begin, end, visible, block_stride, dim, scale,
    BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Context [begin, end) for ROWS query rows: running maximum, sum, and weighted values.

    Every row must see token `begin`. Scores are in base 2 (`scale` includes log2 e).
    """
    column = tl.arange(0, BLOCK_DIM)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], dtype=tl.float32)
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < end
        block = tl.load(table + token // BLOCK_TOKENS, mask=inside, other=0).to(tl.int64)
        slot = block * block_stride + (token % BLOCK_TOKENS) * dim
        k = tl.load(
            keys + slot[None, :] + column[:, None],
            mask=inside[None, :] & (column < dim)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = (token[None, :] < visible[:, None]) & inside[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(
            values + slot[:, None] + column[None, :],
            mask=inside[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher
    return best, total, acc


@triton.jit
def _prefill_kernel(
    q, cache, out, query_start, context, tables, tiles, q_row, q_head, table_stride, value_plane,
    block_stride, head_stride, heads, dim, scale,
    GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One tile of a chunk's rows (tokens x group) and one kv head."""
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    row_start = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - row_start
    seen_before = tl.load(context + sequence) - queries
    in_tile = tl.arange(0, ROWS)
    token = first + in_tile // GROUP
    valid = (in_tile < (ROWS // GROUP) * GROUP) & (token < queries)
    head = kv_head * GROUP + in_tile % GROUP
    column = tl.arange(0, BLOCK_DIM)
    inside = valid[:, None] & (column < dim)[None, :]
    row = (row_start + token).to(tl.int64)
    query = tl.load(
        q + row[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0
    )
    keys = cache + kv_head * head_stride
    _, total, acc = _attend_range(
        query, keys, keys + value_plane, tables + sequence * table_stride,
        0, seen_before + tl.minimum(first + ROWS // GROUP, queries), seen_before + token + 1,
        block_stride, dim, scale, BLOCK_TOKENS, TILE, ROWS, BLOCK_DIM,
    )  # fmt: skip
    tl.store(
        out + (row[:, None] * heads + head[:, None]) * dim + column[None, :],
        acc / total[:, None],
        mask=inside,
    )


@triton.jit
def _decode_kernel(
    q, cache, partial, partial_best, partial_total, context, tables, splits, q_row, q_head,
    table_stride, value_plane, block_stride, head_stride, heads, dim, scale,
    GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One split of a sequence's context and one kv head; a decode's row is its sequence's index."""
    item = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    sequence = tl.load(splits + 2 * item)
    begin = tl.load(splits + 2 * item + 1) * SPLIT
    seen = tl.load(context + sequence)
    in_group = tl.arange(0, ROWS)
    head = kv_head * GROUP + in_group
    column = tl.arange(0, BLOCK_DIM)
    inside = (in_group < GROUP)[:, None] & (column < dim)[None, :]
    query = tl.load(
        q + sequence.to(tl.int64) * q_row + head[:, None] * q_head + column[None, :],
        mask=inside,
        other=0.0,
    )
    keys = cache + kv_head * head_stride
    best, total, acc = _attend_range(
        query, keys, keys + value_plane, tables + sequence * table_stride,
        begin, tl.minimum(begin + SPLIT, seen), tl.zeros([ROWS], dtype=tl.int32) + seen,
        block_stride, dim, scale, BLOCK_TOKENS, TILE, ROWS, BLOCK_DIM,
    )  # fmt: skip
    place = item * heads + head
    tl.store(partial_best + place, best, mask=in_group < GROUP)
    tl.store(partial_total + place, total, mask=in_group < GROUP)
    tl.store(partial + place[:, None] * dim + column[None, :], acc, mask=inside)


@triton.jit
def _merge_kernel(
    partial, partial_best, partial_total, out, split_start, heads, dim, BLOCK_DIM: tl.constexpr
):
    """Merge the splits of one sequence and head, first to last."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_DIM)
    inside = column < dim
    best = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    first = tl.load(split_start + sequence)
    for item in range(first, tl.load(split_start + sequence + 1)):
        place = tl.cast(item, tl.int64) * heads + head
        split_best = tl.load(partial_best + place)
        higher = tl.maximum(best, split_best)
        fade, weight = tl.exp2(best - higher), tl.exp2(split_best - higher)
        total = total * fade + tl.load(partial_total + place) * weight
        part = tl.load(partial + place * dim + column, mask=inside, other=0.0)
        acc = acc * fade + part * weight
        best = higher
    tl.store(out + (sequence.to(tl.int64) * heads + head) * dim + column, acc / total, mask=inside)


def query_tile_tokens(group: int) -> int:
    """Tokens of a prefill tile: as many as fit `QUERY_ROWS` with their group."""
    return QUERY_ROWS // group


def paged_attention_triton(q: Tensor, cache: Tensor, work: GpuWork, scale: float) -> Tensor:
    """o by the kernels above; rows of no sequence (padding) are undefined."""
    _check(q, cache, work)
    kv_heads = cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    base2 = scale * math.log2(math.e)
    if len(work.tiles):
        _prefill_kernel[(len(work.tiles), kv_heads)](
            q, cache, out, work.query_start, work.context, work.block_tables, work.tiles,
            q.stride(0), q.stride(1), work.block_tables.stride(0), cache.stride(0),
            cache.stride(1), cache.stride(2), q.shape[1], q.shape[2], base2,
            GROUP=q.shape[1] // kv_heads, BLOCK_TOKENS=cache.shape[3], TILE=TILE_TOKENS,
            ROWS=QUERY_ROWS, BLOCK_DIM=triton.next_power_of_2(q.shape[2]), num_warps=4,
        )  # fmt: skip
    if len(work.splits):
        _decode(q, cache, work, base2, out)
    return out


def _decode(q: Tensor, cache: Tensor, work: GpuWork, base2: float, out: Tensor) -> None:
    splits, heads, dim = len(work.splits), q.shape[1], q.shape[2]
    kv_heads = cache.shape[2]
    group = heads // kv_heads
    partial = torch.empty((splits, heads, dim), dtype=torch.float32, device=q.device)
    best = torch.empty((splits, heads), dtype=torch.float32, device=q.device)
    total = torch.empty_like(best)
    block_dim = triton.next_power_of_2(dim)
    _decode_kernel[(splits, kv_heads)](
        q, cache, partial, best, total, work.context, work.block_tables, work.splits,
        q.stride(0), q.stride(1), work.block_tables.stride(0), cache.stride(0),
        cache.stride(1), cache.stride(2), heads, dim, base2,
        GROUP=group, BLOCK_TOKENS=cache.shape[3], SPLIT=SPLIT_TOKENS, TILE=TILE_TOKENS,
        ROWS=max(triton.next_power_of_2(group), 16), BLOCK_DIM=block_dim, num_warps=4,
    )  # fmt: skip
    _merge_kernel[(len(work.split_start) - 1, heads)](
        partial, best, total, out, work.split_start, heads, dim, BLOCK_DIM=block_dim, num_warps=1
    )


def _check(q: Tensor, cache: Tensor, work: GpuWork) -> None:
    assert cache.ndim == 5, f"cache is {tuple(cache.shape)}, [2, blocks, heads, tokens, dim] needed"
    assert cache.is_contiguous(), f"one layer's cache must be contiguous, got {cache.stride()}"
    assert q.dtype == cache.dtype, f"q is {q.dtype}, the cache {cache.dtype}"
    assert q.shape[2] == cache.shape[4], f"q has head dim {q.shape[2]}, cache {cache.shape[4]}"
    assert q.shape[1] % cache.shape[2] == 0, f"{q.shape[1]} heads over {cache.shape[2]} kv heads"
    group = q.shape[1] // cache.shape[2]
    assert group <= QUERY_ROWS, f"{group} query heads a kv head, at most {QUERY_ROWS} are packed"
    assert q.stride(2) == 1, f"a head's elements must be adjacent, q has strides {q.stride()}"
    assert SPLIT_TOKENS % TILE_TOKENS == 0, "a split is a whole number of tiles"
    for name in ("query_start", "context", "block_tables", "splits", "split_start", "tiles"):
        value: Tensor = getattr(work, name)
        assert value.dtype == torch.int32, f"{name} is {value.dtype}, int32 needed"
        assert value.is_contiguous(), f"{name} must be contiguous, got {value.stride()}"
