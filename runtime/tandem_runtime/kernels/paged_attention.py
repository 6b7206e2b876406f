"""Causal attention over the paged cache, for prefill chunks and for decode, with grouped queries.

    o[row, h] = sum_t softmax_t(scale * q[row, h] . K[t, h // G]) V[t, h // G],  t <= row's position

q, o: [rows, heads, D]; cache: one layer's [2, blocks, kv heads, T, D]; G = heads / kv heads. The
step's own keys and values are stored already. A kv head's G query heads are rows of one matrix
product ("the group is packed"), so keys and values are read once for all of them.

The order of summation is a function of the sequence alone, never of the batch: decode in splits of
fixed size, merged first to last (flash-decoding); prefill in tiles, first to last, with the online
softmax of FlashAttention-2, masked only where a tile meets the diagonal. Decode programs are as
many as the GPU runs at once and share the splits of the step, which they count on the device: one
CUDA graph serves any lengths. Scores are in base 2 (`scale` includes log2 e). The reference is
cpu_attention.py.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_runtime.kernels.attention_plan import ITEM, SPLIT_TOKENS, GpuWork
from tandem_runtime.kernels.fp8_quantize import FP8
from tandem_runtime.kernels.tuning import attention_tile, programs

QUERY_ROWS: Final = 128
"""Query rows (tokens x group) of a prefill tile."""
MERGE_SPLITS: Final = 32
"""Partial results that are merged at once."""


# -- kernels ---------------------------------------------------------------------------------------
@triton.jit
def _attend(
    q, keys, values, table, begin, end, visible, best, total, acc, block_stride, scale,
    MASKED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Context [begin, end) for all query rows: running maximum, sum, and weighted values.

    A row sees tokens below its `visible`, of which token `begin` is one unless `best` is finite.
    Not MASKED: every row sees all, and `end - begin` is a multiple of TILE.
    """
    column = tl.arange(0, BLOCK_DIM)
    in_head = column < DIM
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < end
        if MASKED:
            block = tl.load(table + token // BLOCK_TOKENS, mask=inside, other=0)
        else:
            block = tl.load(table + token // BLOCK_TOKENS)
        slot = block.to(tl.int64) * block_stride + (token % BLOCK_TOKENS) * DIM
        k_at = keys + slot[None, :] + column[:, None]
        v_at = values + slot[:, None] + column[None, :]
        if MASKED:
            k = tl.load(k_at, mask=inside[None, :] & in_head[:, None], other=0.0)
        elif DIM == BLOCK_DIM:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=in_head[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        if MASKED:
            seen = (token[None, :] < visible[:, None]) & inside[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weights, axis=1)
        if MASKED:
            v = tl.load(v_at, mask=inside[:, None] & in_head[None, :], other=0.0)
        elif DIM == BLOCK_DIM:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=in_head[None, :], other=0.0)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        best = higher
    return best, total, acc


@triton.jit
def _prefill_kernel(
    q, cache, out, ints, tiles, q_row, q_head, value_plane, block_stride, head_stride, heads, scale,
    GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One tile of a chunk's rows (tokens x group) and one kv head."""
    kv_head = tl.program_id(1)
    item = tiles + 4 * tl.program_id(0)
    first, queries, seen = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    table = ints + tl.load(item + 3)
    in_tile = tl.arange(0, ROWS)
    token = in_tile // GROUP
    head = kv_head * GROUP + in_tile % GROUP
    column = tl.arange(0, BLOCK_DIM)
    inside = (token < queries)[:, None] & (column < DIM)[None, :]
    row = (first + token).to(tl.int64)
    query = tl.load(
        q + row[:, None] * q_row + head[:, None] * q_head + column[None, :], mask=inside, other=0.0
    )
    keys = cache + kv_head * head_stride
    values = keys + value_plane
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], dtype=tl.float32)
    diagonal = (seen // TILE) * TILE
    best, total, acc = _attend(
        query, keys, values, table, 0, diagonal, seen + token, best, total, acc, block_stride,
        scale, False, BLOCK_TOKENS, TILE, DIM, BLOCK_DIM,
    )  # fmt: skip
    best, total, acc = _attend(
        query, keys, values, table, diagonal, seen + queries - 1, seen + token, best, total, acc,
        block_stride, scale, True, BLOCK_TOKENS, TILE, DIM, BLOCK_DIM,
    )  # fmt: skip
    tl.store(
        out + (row[:, None] * heads + head[:, None]) * DIM + column[None, :],
        acc / total[:, None],
        mask=inside,
    )


@triton.jit(do_not_specialize_on_alignment=["count"])
def _decode_kernel(
    q, cache, partial, partial_best, partial_total, ints, splits, count, q_row, q_head, value_plane,
    block_stride, head_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Every so manieth pair of a split and a kv head; a decode's row is its sequence's index."""
    in_group = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_DIM)
    inside = (in_group < GROUP)[:, None] & (column < DIM)[None, :]
    for pair in range(tl.program_id(0), tl.load(count) * KV_HEADS, tl.num_programs(0)):
        split, kv_head = pair // KV_HEADS, pair % KV_HEADS
        item = splits + 4 * split
        row, begin, end = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        # Places count from the split's own first block.
        table = ints + tl.load(item + 3)
        head = kv_head * GROUP + in_group
        query = tl.load(
            q + row.to(tl.int64) * q_row + head[:, None] * q_head + column[None, :],
            mask=inside,
            other=0.0,
        )
        keys = cache + kv_head * head_stride
        length = end - begin
        best, total, acc = _attend(
            query, keys, keys + value_plane, table, 0, length,
            tl.zeros([ROWS], dtype=tl.int32) + length,
            tl.full([ROWS], float("-inf"), dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32),
            tl.zeros([ROWS, BLOCK_DIM], dtype=tl.float32), block_stride, scale,
            True, BLOCK_TOKENS, TILE, DIM, BLOCK_DIM,
        )  # fmt: skip
        place = tl.cast(split, tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(partial_best + place, best, mask=in_group < GROUP)
        tl.store(partial_total + place, total, mask=in_group < GROUP)
        tl.store(partial + place[:, None] * DIM + column[None, :], acc, mask=inside)


@triton.jit
def _merge_kernel(
    partial, partial_best, partial_total, out, split_start, heads,
    SPLITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row and head, SPLITS at once, first to last; zeros if it has none."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_DIM)
    best = float("-inf")
    total = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    acc = tl.zeros([BLOCK_DIM], dtype=tl.float32)
    first, end = tl.load(split_start + row), tl.load(split_start + row + 1)
    for start in range(first, end, SPLITS):
        split = start + tl.arange(0, SPLITS)
        there = split < end
        place = split.to(tl.int64) * heads + head
        split_best = tl.load(partial_best + place, mask=there, other=float("-inf"))
        split_total = tl.load(partial_total + place, mask=there, other=0.0)
        part = tl.load(
            partial + place[:, None] * DIM + column[None, :],
            mask=there[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        higher = tl.maximum(best, tl.max(split_best, axis=0))
        weight, fade = tl.exp2(split_best - higher), tl.exp2(best - higher)
        total = total * fade + tl.sum(split_total * weight, axis=0)
        acc = acc * fade + tl.sum(part * weight[:, None], axis=0)
        best = higher
    result = acc / tl.where(total > 0.0, total, 1.0)
    at = out + (row.to(tl.int64) * heads + head) * DIM + column
    tl.store(at, result, mask=column < DIM)


# -- launchers -------------------------------------------------------------------------------------
def query_tile_tokens(group: int) -> int:
    """Tokens of a prefill tile: as many as fit `QUERY_ROWS` with their group."""
    return QUERY_ROWS // group


def paged_attention_triton(q: Tensor, cache: Tensor, work: GpuWork, scale: float) -> Tensor:
    """o by the kernels above; rows of no sequence are undefined, of padded decodes zero.

    `work` is planned with tiles of `query_tile_tokens`.
    """
    _check(q, cache, work)
    kv_heads, heads, dim = cache.shape[2], q.shape[1], q.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    base2 = scale * math.log2(math.e)
    if len(work.tiles):
        tile = attention_tile("prefill", heads // kv_heads, dim, q.dtype, q.device)
        _prefill_kernel[(len(work.tiles), kv_heads)](
            q, cache, out, work.ints, work.tiles, q.stride(0), q.stride(1), cache.stride(0),
            cache.stride(1), cache.stride(2), heads, base2,
            GROUP=heads // kv_heads, BLOCK_TOKENS=cache.shape[3], TILE=tile.tokens, ROWS=QUERY_ROWS,
            DIM=dim, BLOCK_DIM=triton.next_power_of_2(dim), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    if len(work.split_start) > 1:
        _decode(q, cache, work, base2, out)
    return out


def _decode(q: Tensor, cache: Tensor, work: GpuWork, base2: float, out: Tensor) -> None:
    splits, kv_heads, heads, dim = len(work.splits), cache.shape[2], q.shape[1], q.shape[2]
    group = heads // kv_heads
    tile = attention_tile("decode", group, dim, q.dtype, q.device)
    partial = torch.empty((splits, heads, dim), dtype=torch.float32, device=q.device)
    best = torch.empty((splits, heads), dtype=torch.float32, device=q.device)
    total = torch.empty_like(best)
    block_dim = triton.next_power_of_2(dim)
    _decode_kernel[(programs(q.device, tile),)](
        q, cache, partial, best, total, work.ints, work.splits, work.split_start[-1:],
        q.stride(0), q.stride(1), cache.stride(0), cache.stride(1), cache.stride(2), base2,
        KV_HEADS=kv_heads, GROUP=group, BLOCK_TOKENS=cache.shape[3], TILE=tile.tokens,
        ROWS=max(triton.next_power_of_2(group), 16), DIM=dim, BLOCK_DIM=block_dim,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _merge_kernel[(len(work.split_start) - 1, heads)](
        partial, best, total, out, work.split_start, heads,
        SPLITS=MERGE_SPLITS, DIM=dim, BLOCK_DIM=block_dim, num_warps=4,
    )  # fmt: skip


def _check(q: Tensor, cache: Tensor, work: GpuWork) -> None:
    assert cache.ndim == 5, f"cache is {tuple(cache.shape)}, [2, blocks, heads, tokens, dim] needed"
    assert cache.is_contiguous(), f"one layer's cache must be contiguous, got {cache.stride()}"
    assert cache.dtype in (q.dtype, FP8), f"q is {q.dtype}, the cache {cache.dtype}"
    assert q.shape[2] == cache.shape[4], f"q has head dim {q.shape[2]}, cache {cache.shape[4]}"
    assert q.shape[1] % cache.shape[2] == 0, f"{q.shape[1]} heads over {cache.shape[2]} kv heads"
    group = q.shape[1] // cache.shape[2]
    assert group <= QUERY_ROWS, f"{group} query heads a kv head, at most {QUERY_ROWS} are packed"
    assert q.stride(2) == 1, f"a head's elements must be adjacent, q has strides {q.stride()}"
    assert SPLIT_TOKENS % cache.shape[3] == 0, f"blocks of {cache.shape[3]} tokens divide no split"
    for name in ("ints", "split_start", "splits", "tiles"):
        value: Tensor = getattr(work, name)
        assert value.dtype == torch.int32, f"{name} is {value.dtype}, int32 needed"
        assert value.is_contiguous(), f"{name} must be contiguous, got {value.stride()}"
    for items in (work.splits, work.tiles):
        assert items.shape[1] == ITEM, f"items are {tuple(items.shape)}, [n, {ITEM}] needed"
