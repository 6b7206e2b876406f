"""Attention as paged_attention.py defines it, by torch: what the CPU runs, and the reference.

Context is summed in tiles of `CPU_TILE_TOKENS`, first to last, for decode rows and for prefill rows
alike: bitwise equal however a prompt is cut into chunks and whatever else is in the batch, as long
as each product has `MIN_ROWS` rows: below that MKL takes another path in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from tandem_runtime.kernels.attention_plan import Step

MIN_ROWS: Final = 4
CPU_TILE_TOKENS: Final = 128
"""Context is summed in tiles of this size on the CPU, and padded to a multiple of it."""
CPU_QUERY_TOKENS: Final = 128
"""Query tokens of one piece of CPU work: bounds the scores that are alive."""


@dataclass(frozen=True)
class CpuPiece:
    """n sequences with m query tokens each, as one batch of matrix products."""

    sequences: int
    rows: Tensor
    """[n * m] int64 rows of the step."""
    blocks: Tensor
    """[n * length / T] int64: each sequence's blocks, padded with the scrap block."""
    hidden: Tensor
    """[n, 1, m, 1, length] bool: context that a query token must not see."""


def plan_cpu(step: Step) -> list[CpuPiece]:
    """Decodes of about one length together, each prefill in runs of `CPU_QUERY_TOKENS`."""
    pieces, rows = [], 0
    by_length: dict[int, list[int]] = {}
    for sequence, (queries, context) in enumerate(
        zip(step.query_tokens, step.context_tokens, strict=True)
    ):
        if queries == 1:
            # Rounded up to a power of two: little padding, few groups.
            tiles = 1 << (-(-context // CPU_TILE_TOKENS) - 1).bit_length()
            by_length.setdefault(tiles, []).append(sequence)
        for start in range(0, queries if queries > 1 else 0, CPU_QUERY_TOKENS):
            end = min(start + CPU_QUERY_TOKENS, queries)
            seen = torch.arange(context - queries + start, context - queries + end) + 1
            piece_rows = torch.arange(rows + start, rows + end)
            pieces.append(_piece(step, [sequence], piece_rows, seen[None]))
        rows += queries
    for members in by_length.values():
        seen = torch.tensor([[step.context_tokens[m]] for m in members])
        # Sequences of one row come first: a decode's row is its sequence's index.
        pieces.append(_piece(step, members, torch.tensor(members), seen))
    return pieces


def _piece(step: Step, members: list[int], rows: Tensor, seen: Tensor) -> CpuPiece:
    """`seen`: [n, m] context tokens that each query token sees."""
    length = -(-int(seen.max()) // CPU_TILE_TOKENS) * CPU_TILE_TOKENS
    width = length // step.block_tokens
    blocks = []
    for member in members:
        table = step.block_tables[member][:width]
        blocks += table + [0] * (width - len(table))
    hidden = torch.arange(length) >= seen[:, None, :, None, None]
    return CpuPiece(len(members), rows, torch.tensor(blocks), hidden)


def paged_attention_reference(
    q: Tensor, cache: Tensor, work: list[CpuPiece], scale: float
) -> Tensor:
    """o as above; rows of no sequence (padding) come out as zeros."""
    out = torch.zeros_like(q)
    kv_heads, dim = cache.shape[2], cache.shape[4]
    for piece in work:
        n = piece.sequences
        query = q[piece.rows].view(n, -1, kv_heads, q.shape[1] // kv_heads, dim).transpose(1, 2)
        o = _attend(query, *_gather(cache, piece), piece.hidden, scale)
        out[piece.rows] = o.transpose(1, 2).reshape(-1, q.shape[1], dim)
    return out


def _gather(cache: Tensor, piece: CpuPiece) -> tuple[Tensor, Tensor]:
    """Keys and values, [n * kv heads, length, D] each."""
    n, (_, _, kv_heads, block_tokens, dim) = piece.sequences, cache.shape
    blocks = cache.index_select(1, piece.blocks)
    by_head = blocks.view(2, n, -1, kv_heads, block_tokens, dim).transpose(2, 3)
    k, v = by_head.reshape(2, n * kv_heads, -1, dim).unbind()
    return k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """[n, kv heads, m, G, D] attends to [n * kv heads, length, D]."""
    shape, dim, length = q.shape, q.shape[-1], k.shape[1]
    rows = q.reshape(k.shape[0], -1, dim)
    count = rows.shape[1]
    if count < MIN_ROWS:
        rows = functional.pad(rows, (0, 0, 0, MIN_ROWS - count))
    scores = torch.bmm(rows, k.transpose(1, 2)).float().mul_(scale)
    scores[:, :count].view(*shape[:-1], length).masked_fill_(hidden, float("-inf"))
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    sums = weights.view(*weights.shape[:2], -1, CPU_TILE_TOKENS).sum(-1)
    weights = weights.to(v.dtype)
    total, out = sums[..., :1], torch.bmm(weights[..., :CPU_TILE_TOKENS], v[:, :CPU_TILE_TOKENS])
    out = out.float()
    for index in range(1, length // CPU_TILE_TOKENS):
        tile = slice(index * CPU_TILE_TOKENS, (index + 1) * CPU_TILE_TOKENS)
        total = total + sums[..., index : index + 1]
        out += torch.bmm(weights[..., tile], v[:, tile])
    return (out / total)[:, :count].to(q.dtype).view(shape)
