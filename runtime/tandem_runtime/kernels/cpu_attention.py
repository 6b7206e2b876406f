"""Attention as paged_attention.py defines it, by torch: what the CPU runs, and the reference.

A block's keys are stored transposed (`CpuLayer`), so that a block is the right operand of a product
as it lies in memory. Blocks are multiplied one by one, as one batch over all blocks: with the query
rows of the sequence that owns each (a kv head's query heads are rows of one product). Decodes read
the pool in place, whatever the block tables look like, as long as their blocks are most of a run of
it. Scores are put in order for one softmax, and partial products are summed first to last:

    S_b = q K_b^T    (all blocks b)     w = softmax(S_0 .. S_n)     o = sum_b w_b V_b

Nothing in this depends on the rest of the batch or on how a prompt is cut into chunks, so results
are bitwise equal; in float32 as long as each product has `MIN_ROWS` rows: below, MKL takes another
path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.kernels.fp8_kv import from_pool

MIN_ROWS: Final = 4
CHUNK_TOKENS: Final = 64
"""Query tokens of one piece of prefill: its scores stay in the processor's cache."""
_HOLES: Final = 1.5
"""A run of the pool is read in place while it is at most so much longer than what is wanted."""


class CpuLayer(NamedTuple):
    """One layer's cache: views [blocks, kv heads, T, D]; in memory, a block's keys are [D, T]."""

    keys: Tensor
    values: Tensor


def cpu_layer(cache: Tensor) -> CpuLayer:
    """The CPU's view of a layer's cache [2, blocks, kv heads, T, D]; leading dimensions stay."""
    keys, values = cache.unbind(-5)
    return CpuLayer(keys.view(*keys.shape[:-2], *keys.shape[:-3:-1]).transpose(-1, -2), values)


@dataclass(frozen=True)
class Chunk:
    """Query tokens of one sequence, and the w blocks of its context."""

    rows: slice
    blocks: Tensor | slice
    hidden: Tensor
    """[m, 1, tail] bool: the last columns of the context, where a token must not see all of it."""


@dataclass(frozen=True)
class Decodes:
    """n sequences of one row, of up to w blocks each; p blocks in all."""

    rows: Tensor | slice
    blocks: Tensor | slice
    """[p] the blocks, or a run of the pool that holds them."""
    owners: Tensor
    """[p] int64: the row that attends to each."""
    places: Tensor
    """[n * w] int64: where in `blocks` each sequence's are, in their order; p where it has fewer.
    """
    in_order: Tensor
    """[n * lines * w] int64: from scores of blocks [p * lines, T] to those of sequences. A block
    has `lines` lines of scores, one for each row of its products."""
    by_block: Tensor
    """[p * lines] int64: the way back."""
    hidden: Tensor
    """[n, 1, tail] bool"""
    padded: bool
    """Whether some have fewer than w."""


CpuWork = list[Chunk | Decodes]


# -- the plan --------------------------------------------------------------------------------------
def plan_cpu(step: Step, kv_heads: int, group: int, dtype: torch.dtype) -> CpuWork:
    """Decodes of about one length together, each prefill in runs of `CHUNK_TOKENS`."""
    lines = kv_heads * (group + _missing_rows(group, dtype))
    work: CpuWork = []
    row = 0
    for queries, context, table in zip(
        step.query_tokens, step.context_tokens, step.block_tables, strict=True
    ):
        for start in range(0, queries if queries > 1 else 0, CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, queries)
            rows, unseen = slice(row + start, row + end), context - queries
            work.append(_chunk(table, step.block_tokens, rows, unseen + start + 1, unseen + end))
        row += queries
    for members in _of_about_one_length(step.context_tokens[: step.decodes]):
        work.append(_decodes(step, members, lines))
    return work


def _chunk(table: list[int], size: int, rows: slice, first: int, last: int) -> Chunk:
    """Its first row sees `first` tokens, its last `last`."""
    wanted = table[: -(-last // size)]
    run = slice(wanted[0], wanted[0] + len(wanted))
    in_order = wanted == list(range(run.start, run.stop))
    columns = torch.arange(first // size * size, len(wanted) * size)
    hidden = columns >= torch.arange(first, last + 1)[:, None, None]
    return Chunk(rows, run if in_order else torch.tensor(wanted), hidden)


def _of_about_one_length(lengths: list[int]) -> Iterator[list[int]]:
    """Groups in which the longest is at most twice the shortest: little padding, few groups."""
    group: list[int] = []
    for member in sorted(range(len(lengths)), key=lambda m: -lengths[m]):
        if group and lengths[member] * 2 < lengths[group[0]]:
            yield sorted(group)
            group = []
        group.append(member)
    if group:
        yield sorted(group)


def _decodes(step: Step, members: list[int], lines: int) -> Decodes:
    """Sequences of one row come first in a step: a decode's row is its sequence's index."""
    n, size = len(members), step.block_tokens
    seen = [step.context_tokens[m] for m in members]
    tables = [step.block_tables[m][: -(-c // size)] for m, c in zip(members, seen, strict=True)]
    width = max(map(len, tables))
    wanted = [block for table in tables for block in table]
    first, run = min(wanted), max(wanted) + 1 - min(wanted)
    in_place = len(set(wanted)) == len(wanted) and run <= _HOLES * len(wanted)
    total = run if in_place else len(wanted)
    owners, tiles, places = [0] * total, [0] * total, [total] * (n * width)
    at = 0
    for index, table in enumerate(tables):
        for tile, block in enumerate(table, start=index * width):
            here = block - first if in_place else at
            owners[here], tiles[here], places[tile] = members[index], tile, here
            at += 1
    columns = torch.arange(min(seen) // size * size, width * size)
    line, place, back = torch.arange(lines), torch.tensor(places), torch.tensor(tiles)[:, None]
    of_sequence = place.clamp(max=total - 1).view(n, 1, width) * lines + line[:, None]
    return Decodes(
        rows=slice(0, n) if n == step.decodes else torch.tensor(members),
        blocks=slice(first, first + run) if in_place else torch.tensor(wanted),
        owners=torch.tensor(owners),
        places=place,
        in_order=of_sequence.flatten(),
        by_block=((back // width * lines + line) * width + back % width).flatten(),
        hidden=columns >= torch.tensor(seen)[:, None, None],
        padded=len(wanted) < n * width,
    )


# -- attention -------------------------------------------------------------------------------------
def paged_attention_reference(q: Tensor, layer: CpuLayer, work: CpuWork, scale: float) -> Tensor:
    """o as in paged_attention.py; rows of no sequence (padding) are undefined."""
    out = torch.empty(q.shape, dtype=q.dtype)
    for piece in work:
        k = from_pool(_blocks(layer.keys.transpose(-1, -2), piece.blocks), q.dtype)
        v = from_pool(_blocks(layer.values, piece.blocks), q.dtype)
        if isinstance(piece, Chunk):
            out[piece.rows] = _attend_chunk(q[piece.rows], k, v, piece, scale)
        else:
            out[piece.rows] = _attend_decodes(q, k, v, piece, scale)
    return out


def _blocks(plane: Tensor, blocks: Tensor | slice) -> Tensor:
    return plane[blocks] if isinstance(blocks, slice) else plane.index_select(0, blocks)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """q: [m, heads, D]; k: [w, kv heads, D, T]; v: [w, kv heads, T, D]; out as q."""
    (m, heads, dim), (blocks, kv_heads, _, size) = q.shape, k.shape
    count = m * heads // kv_heads
    rows = (q * scale).view(m, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, count, dim)
    rows = _with_missing_rows(rows)
    padded = rows.shape[1]
    rows = rows.expand(blocks, *rows.shape).flatten(0, 1)
    scores = torch.bmm(rows, k.flatten(0, 1)).view(blocks, kv_heads, padded, size)
    scores = scores.permute(1, 2, 0, 3).reshape(kv_heads, padded, -1)
    tail = scores[:, :count, scores.shape[2] - chunk.hidden.shape[2] :]
    tail.view(kv_heads, m, heads // kv_heads, tail.shape[2]).masked_fill_(
        chunk.hidden, float("-inf")
    )
    weights = scores.softmax(-1).view(kv_heads, padded, blocks, size).permute(2, 0, 1, 3)
    parts = torch.bmm(weights.reshape(-1, padded, size), v.flatten(0, 1))
    out = parts.view(blocks, kv_heads, padded, dim).sum(0)[:, :count]
    return out.view(kv_heads, m, -1, dim).transpose(0, 1).reshape(q.shape)


def _attend_decodes(q: Tensor, k: Tensor, v: Tensor, decodes: Decodes, scale: float) -> Tensor:
    """q: [rows, heads, D]; k: [p, kv heads, D, T]; v: [p, kv heads, T, D]; out: [n, heads, D]."""
    (blocks, kv_heads, dim, size), n = k.shape, len(decodes.hidden)
    group = q.shape[1] // kv_heads
    rows = q.index_select(0, decodes.owners).mul_(scale).view(-1, group, dim)
    rows = _with_missing_rows(rows)
    scores = torch.bmm(rows, k.flatten(0, 1)).view(-1, size).index_select(0, decodes.in_order)
    scores = scores.view(n, kv_heads * rows.shape[1], -1)
    tail = scores[:, :, scores.shape[2] - decodes.hidden.shape[2] :]
    tail.masked_fill_(decodes.hidden, float("-inf"))
    weights = scores.softmax(-1).view(-1, size).index_select(0, decodes.by_block)
    parts = torch.bmm(weights.view(-1, rows.shape[1], size), v.flatten(0, 1)).view(blocks, -1)
    if decodes.padded:
        parts = torch.cat((parts, parts.new_zeros(1, parts.shape[1])))
    out = parts.index_select(0, decodes.places).view(n, -1, parts.shape[1]).sum(1)
    return out.view(n, kv_heads, -1, dim)[:, :, :group].reshape(n, -1, dim)


def _missing_rows(count: int, dtype: torch.dtype) -> int:
    return max(MIN_ROWS - count, 0) if dtype == torch.float32 else 0


def _with_missing_rows(rows: Tensor) -> Tensor:
    """[..., rows, D] with as many rows as a product needs."""
    missing = _missing_rows(rows.shape[-2], rows.dtype)
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows
