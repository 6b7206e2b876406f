"""Attention as paged_attention.py defines it, on the CPU, over the pool as it lies in memory.

The layout is that of tile.py's right operands (P elements of the summed dimension to a word of 32
bits, 2 of 16-bit dtypes): of a block and head, keys are [D / P, T, P] and values [T / P, D, P].
A pool of fp8 has P = 1 and a byte an element; a block of it is looked up before it is multiplied.
For some tokens of one sequence and one kv head, whose query heads are rows of one product:

    s[r, t] = q[r] k[t]     p = exp(scale (s - max s)), 0 where t is hidden     o = p v / sum p

p is rounded to the dtype for the second product, maximum and sum are float32's. All loops go from
the sequence's first block to its last, in a row's own order: its bits depend on nothing but its
sequence, in a prefill chunk as in a decode.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tandem_runtime.kernels.attention_plan import Ints, Step
from tandem_runtime.kernels.compiled import (
    LINE_BYTES,
    as_float,
    compiled,
    float_bits,
    keep,
    line_in,
    narrow,
    pointer,
    prefetch,
    widen,
    words_of,
)
from tandem_runtime.kernels.fp8_kv import to_pool, values_of
from tandem_runtime.kernels.fp8_quantize import FP8
from tandem_runtime.kernels.softmax import softmax
from tandem_runtime.kernels.team import PART_ROWS, Kernel, empty, share, share_rows
from tandem_runtime.kernels.tile import begin, end, product, takes_floats

PIECE_TOKENS: Final = 16
"""Query tokens that are attended together: their scores stay in the processor's cache."""
TILE_ROWS: Final = 32
"""Of them, times the group, that are multiplied at once."""
LOG2_E: Final = 1.4426950408889634


@dataclass(frozen=True)
class CpuWork:
    """A step's rows, in pieces."""

    pieces: Ints
    """[n, 4] of each: its first row, its rows, tokens that the first one sees before itself, and
    where its sequence's blocks begin in `tables`."""
    tables: Ints
    """Block ids."""


def plan_cpu(step: Step) -> CpuWork:
    """Sequence after sequence, as the step has them."""
    pieces, row, table_at = [], 0, 0
    for count, context, table in zip(
        step.query_tokens, step.context_tokens, step.block_tables, strict=True
    ):
        for start in range(0, count, PIECE_TOKENS):
            rows = min(count - start, PIECE_TOKENS)
            pieces.append((row + start, rows, context - count + start, table_at))
        row += count
        table_at += len(table)
    ids = np.fromiter(chain.from_iterable(step.block_tables), np.int32, table_at)
    return CpuWork(np.array(pieces, np.int32).reshape(-1, 4), ids)


# -- the layout ------------------------------------------------------------------------------------
def _together(dtype: torch.dtype) -> int:
    """P of a pool."""
    return 1 if dtype == FP8 else words_of(dtype)


def pack(planes: Tensor) -> Tensor:
    """From [..., k|v, blocks, kv heads, T, D] to the same memory's shape as the pool has it."""
    size, dim = planes.shape[-2:]
    p = _together(planes.dtype)
    keys, values = planes.unbind(-5)
    keys = keys.unflatten(-1, (dim // p, p)).movedim(-3, -2)
    values = values.unflatten(-2, (size // p, p)).transpose(-1, -2)
    return torch.stack(
        [plane.reshape(*plane.shape[:-3], size, dim) for plane in (keys, values)], -5
    )


def unpack(cache: Tensor) -> Tensor:
    """The inverse of `pack`: a copy in plain order."""
    size, dim = cache.shape[-2:]
    p = _together(cache.dtype)
    keys, values = (plane.flatten(-2) for plane in cache.unbind(-5))
    keys = keys.unflatten(-1, (dim // p, size, p)).movedim(-2, -3).flatten(-2)
    values = values.unflatten(-1, (size // p, dim, p)).transpose(-1, -2).flatten(-3, -2)
    return torch.stack((keys, values), -5)


_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""What is copied as it is, by its size: torch copies no fp8 by index."""


def whole_blocks(page: Tensor, cache: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a page of whole blocks as the pool has them: twice (of the page, of the
    pool), both [layers, blocks, ...] views in which equal places hold equal elements.

    page: [layers, 2, kv heads, blocks * T, D], contiguous; cache as in the pool, or some layers.
    """
    layers, _, count, heads, size, dim = cache.shape
    p = _together(cache.dtype)
    pairs = []
    for plane, wide in enumerate((p, 1)):
        raw = _RAW[wide * cache.itemsize]
        tokens = page[:, plane].view(raw).unflatten(2, (-1, size)).transpose(1, 2)
        pool = cache[:, plane].view(raw)
        if plane == 0:  # [..., D / p, T], of p elements each
            tokens = tokens.transpose(-1, -2)
            pool = pool.view(layers, count, heads, -1).unflatten(-1, (dim // p, size))
        else:
            tokens = tokens.unflatten(3, (size // p, p)).transpose(-1, -2)
            pool = pool.view(layers, count, heads, -1).unflatten(-1, (size // p, dim, p))
        pairs.append((tokens, pool))
    return pairs


def _values_at(cache: Tensor) -> int:
    """Address of a layer's values, which come after its keys."""
    return cache.data_ptr() + cache.stride(0) * cache.itemsize


def _store(a, part, element):
    rows, heads, size = a[0], a[1], a[2]
    dim, p, kv_row = a[3], a[4], a[5]
    source, slot_of = pointer(a[6], element), a[7]
    key, value = pointer(a[8], element), pointer(a[9], element)
    first = part * PART_ROWS
    for row in range(first, min(first + PART_ROWS, rows)):
        slot = pointer(slot_of, np.int64(0))[row]
        block, token = slot // size, slot % size
        for head in range(heads):
            base = (block * heads + head) * size * dim
            k = row * kv_row + head * dim
            v = k + heads * dim
            for d in range(dim):
                key[base + d // p * size * p + token * p + d % p] = source[k + d]
                value[base + token // p * dim * p + d * p + token % p] = source[v + d]


_STORE: Final = Kernel(_store)


def store_kv_cpu(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    """store_kv.py's formula, into this layout."""
    rows, _, heads, dim = kv.shape
    size, p = cache.shape[3], _together(cache.dtype)
    if cache.dtype == FP8:
        kv = to_pool(kv, FP8)
    assert kv.stride()[1:] == (heads * dim, dim, 1), f"kv has strides {kv.stride()}"
    assert cache.is_contiguous(), f"one layer's cache must be contiguous, got {cache.stride()}"
    assert cache.dtype == kv.dtype, f"kv is {kv.dtype}, the cache {cache.dtype}"
    assert size % p == 0, f"a block of {size} tokens has no whole words of {p}"
    assert dim % p == 0, f"a head of {dim} has no whole words of {p}"
    share_rows(
        _STORE, kv.dtype, rows, heads, size, dim, p, kv.stride(0), kv.data_ptr(), slots.data_ptr(),
        cache.data_ptr(), _values_at(cache),
    )  # fmt: skip


# -- attention -------------------------------------------------------------------------------------
@compiled
def _looked_up(element, codes, named, block, outer, inner, p):
    """Address of a block [outer / p, inner, p] of the dtype, from bytes [outer, inner] of fp8."""
    code, value = pointer(codes, np.uint8(0)), pointer(named, element)
    target = pointer(block, element)
    for i in range(outer):
        for j in range(inner):
            target[i // p * inner * p + j * p + i % p] = value[code[i * inner + j]]
    return block


@compiled
def _lines(words):
    """So many words and what fills the last line."""
    return words + 15 & -16


@compiled
def _gather(element, q, q_row, rows, n, group, dim, wide):
    """Queries of some tokens and one kv head, one after the other; as float32 if `wide`."""
    source = pointer(q, element)
    target, floats = pointer(rows, element), pointer(rows, np.float32(0))
    for r in range(n):
        first = r // group * q_row + r % group * dim
        if wide:
            for d in range(dim):
                floats[r * dim + d] = widen(source[first + d])
        else:
            for d in range(dim):
                target[r * dim + d] = source[first + d]


@compiled
def _attend_piece(
    element, q, q_row, out, out_row, keys, values, named, table, block_bytes, seen, tokens, group,
    size, dim, p, to_log2,
):  # fmt: skip
    """Some tokens of one sequence, of which the first sees `seen` earlier ones, and one kv head."""
    blocks, n = (seen + tokens + size - 1) // size, tokens * group
    width = _lines(blocks * size)
    wide_q = takes_floats(element, dim // p, size)
    wide_w = takes_floats(element, size // p, dim)
    q_line, w_line = dim if wide_q else dim // p, width if wide_w else width // p
    scores_words, rows_words, sums_words = _lines(n * width), _lines(n * q_line), _lines(n * dim)
    memory = np.empty(
        4 * (2 * scores_words + rows_words + sums_words + size * dim) + LINE_BYTES, np.uint8
    )
    scores = line_in(memory)
    # Rows of weights may lie where their scores were, if they are as long.
    weights = scores if wide_w else scores + 4 * scores_words
    rows = weights + 4 * scores_words
    sums = rows + 4 * rows_words
    block = sums + 4 * sums_words
    totals = np.empty(n, np.float32)
    _gather(element, q, q_row, rows, n, group, dim, wide_q)
    for r in range(0, n, TILE_ROWS):
        count = min(n - r, TILE_ROWS)
        begin(element, count)
        for b in range(blocks):
            k = keys + table[b] * block_bytes
            if named != 0:
                k = _looked_up(element, k, named, block, dim, size, p)
            elif r == 0:
                prefetch(values + table[b] * block_bytes, 4 * size * dim // p)
            s, a = scores + 4 * (r * width + b * size), rows + 4 * r * q_line
            product(element, True, s, width, a, q_line, k, size, dim // p, count, size)
    for r in range(n):
        s, w = scores + 4 * r * width, weights + 4 * r * w_line
        score = pointer(s, np.float32(0))
        for t in range(seen + r // group + 1, width):
            score[t] = -np.inf
        totals[r] = softmax(element, s, w, width, to_log2, wide_w)
    for r in range(0, n, TILE_ROWS):
        count = min(n - r, TILE_ROWS)
        begin(element, count)
        for b in range(blocks):
            v = values + table[b] * block_bytes
            if named != 0:
                v = _looked_up(element, v, named, block, size, dim, p)
            c, a = sums + 4 * r * dim, weights + 4 * (r * w_line + b * size * w_line // width)
            product(element, b == 0, c, dim, a, w_line, v, dim, size // p, count, dim)
    end(element)
    out_at, sum_at = pointer(out, element), pointer(sums, np.float32(0))
    for r in range(n):
        target = r // group * out_row + r % group * dim
        for d in range(dim):
            out_at[target + d] = narrow(sum_at[r * dim + d] / totals[r], element)
    keep(memory)


def _attend(a, part, element):
    """One kv head of a piece. `named`: address of the values of fp8's 256 codes, or 0 where the
    pool has q's dtype."""
    q, q_row, out = a[0], a[1], a[2]
    keys, values, named = a[3], a[4], a[5]
    kv_heads, group = a[8], a[9]
    size, dim, p = a[10], a[11], a[12]
    piece = pointer(a[6] + 16 * (part // kv_heads), np.int32(0))
    row, tokens, seen, head = piece[0], piece[1], piece[2], part % kv_heads
    table = pointer(a[7] + 4 * piece[3], np.int32(0))
    out_row, width = kv_heads * group * dim, 4 // p
    head_bytes = size * dim * (width if named == 0 else 1)
    _attend_piece(
        element,
        q + (row * q_row + head * group * dim) * width, q_row,
        out + (row * out_row + head * group * dim) * width, out_row,
        keys + head * head_bytes, values + head * head_bytes, named, table,
        kv_heads * head_bytes, seen, tokens, group, size, dim, p,
        as_float(a[13]),
    )  # fmt: skip


_ATTEND: Final = Kernel(_attend)


def paged_attention_cpu(q: Tensor, cache: Tensor, work: CpuWork, scale: float) -> Tensor:
    """o as in paged_attention.py; rows of no sequence (padding) are undefined."""
    _, heads, dim = q.shape
    _, _, kv_heads, size, cache_dim = cache.shape
    assert heads % kv_heads == 0, f"{heads} heads over {kv_heads} kv heads"
    assert dim == cache_dim, f"q has head dim {dim}, cache {cache_dim}"
    assert cache.dtype in (q.dtype, FP8), f"q is {q.dtype}, the cache {cache.dtype}"
    named = values_of(q.dtype).data_ptr() if cache.dtype == FP8 else 0
    assert q.stride()[1:] == (dim, 1), f"heads must be adjacent, q has strides {q.stride()}"
    out = empty(q.shape, q.dtype)
    share(
        _ATTEND, q.dtype, len(work.pieces) * kv_heads, q.data_ptr(), q.stride(0), out.data_ptr(),
        cache.data_ptr(), _values_at(cache), named, work.pieces.ctypes.data,
        work.tables.ctypes.data, kv_heads, heads // kv_heads, size, dim, words_of(q.dtype),
        float_bits(scale * LOG2_E),
    )  # fmt: skip
    return out
