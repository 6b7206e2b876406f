"""Mixture of experts: which experts a token goes to, and their linear layers as one.

Routing, after Mixtral: the k likeliest experts of a token, weighted by their share of the k.

    p = softmax(logits[r])                              in float32
    experts[r] = the k largest of p, largest first, the lower expert first among equals
    weights[r] = p[experts[r]] / sum(p[experts[r]])

Grouped linear layers: pair i = r * k + s of a token and its s-th expert; with share = k the rows of
x are tokens, with share = 1 they are pairs.

    y[i] = x[i // share] W[experts[i]]^T

logits: [rows, E]; experts: [rows, k] int64; weights: [rows, k] float32; x: [pairs / share, K];
W: [E, N, K]; y: [pairs, N] of x's dtype, summed in float32. The kernel sorts pairs by expert and
gives each program a tile of one expert's pairs, as MegaBlocks does (Gale et al., 2022); its grid
depends on the number of pairs alone, so that a graph serves any routing.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def route_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights, experts) as above."""
    p, experts = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    p, experts = p[:, :k], experts[:, :k].contiguous()
    return p / p.sum(-1, keepdim=True), experts


def grouped_linear_reference(
    x: Tensor, linears: Sequence[Callable[[Tensor], Tensor]], experts: Tensor, share: int
) -> Tensor:
    """y as above; `linears` are x -> x W[e]^T."""
    pairs = experts.flatten()
    y: Tensor | None = None
    for index, linear in enumerate(linears):
        mine = (pairs == index).nonzero().squeeze(1)
        if len(mine) == 0:
            continue
        part = linear(x[mine // share])
        if y is None:
            y = part.new_empty((len(pairs), part.shape[1]))
        y[mine] = part
    assert y is not None, "no pair goes to any of the experts"
    return y


@triton.jit
def _route_kernel(
    logits, weights, experts, count, K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    value = tl.load(logits + row * count + index, mask=index < count, other=float("-inf"))
    p = tl.exp(value.to(tl.float32) - tl.max(value.to(tl.float32), axis=0))
    slots = tl.arange(0, SLOTS)
    picked = tl.zeros((SLOTS,), dtype=tl.float32)
    for slot in tl.static_range(K):
        best = tl.max(p, axis=0)
        # Where p is not a number nothing equals the largest; the index must stay one.
        expert = tl.minimum(tl.min(tl.where(p == best, index, BLOCK), axis=0), count - 1)
        tl.store(experts + row * K + slot, expert.to(tl.int64))
        picked = tl.where(slots == slot, best, picked)
        p = tl.where(index == expert, -1.0, p)
    tl.store(weights + row * K + slots, picked / tl.sum(picked, axis=0), mask=slots < K)


def route_triton(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by one program a row."""
    rows, count = logits.shape
    assert 1 <= k <= count, f"{k} of {count} experts cannot be picked"
    assert logits.is_contiguous(), f"logits have strides {logits.stride()}, contiguous needed"
    weights = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    slots, block = triton.next_power_of_2(k), triton.next_power_of_2(count)
    _route_kernel[(rows,)](
        logits, weights, experts, count, K=k, SLOTS=slots, BLOCK=block, num_warps=1
    )
    return weights, experts


@triton.jit
def _grouped_linear_kernel(
    x, w, y, order, tile_experts, tile_starts, tile_ends, columns, inner,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    start, end = tl.load(tile_starts + tile), tl.load(tile_ends + tile)
    if start >= end:
        return
    position = start + tl.arange(0, BLOCK_M)
    taken = position < end
    pair = tl.load(order + position, mask=taken, other=0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = column < columns
    k = tl.arange(0, BLOCK_K)
    x_at = x + (pair // SHARE)[:, None] * inner + k[None, :]
    expert = tl.load(tile_experts + tile)
    w_at = w + (expert * columns + column)[None, :] * inner + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for left in range(inner, 0, -BLOCK_K):
        a = tl.load(x_at, mask=taken[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(w_at, mask=within[None, :] & (k < left)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    tl.store(
        y + pair[:, None] * columns + column[None, :], total, mask=taken[:, None] & within[None, :]
    )


def _tiles(pairs: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs in the order of their experts, and each tile's expert, first and end place in it.

    No host synchronisation; as many tiles as any routing may need, the last ones empty.
    """
    device = pairs.device
    sizes = (pairs[:, None] == torch.arange(count, device=device)).sum(0)
    ends, tiles = sizes.cumsum(0), -(-sizes // tile)
    tile_ends = tiles.cumsum(0)
    number = torch.arange(len(pairs) // tile + min(count, len(pairs)), device=device)
    expert = torch.searchsorted(tile_ends, number, right=True)
    used, expert = expert < count, expert.clamp(max=count - 1)
    start = (ends - sizes)[expert] + (number - (tile_ends - tiles)[expert]) * tile
    end = torch.where(used, torch.minimum(ends[expert], start + tile), start)
    return pairs.argsort(stable=True), expert, start, end


def grouped_linear_triton(x: Tensor, w: Tensor, experts: Tensor, share: int) -> Tensor:
    """The same by one program for a tile of an expert's pairs and 128 columns."""
    count, columns, inner = w.shape
    pairs = experts.flatten()
    assert x.shape == (len(pairs) // share, inner), (
        f"x is {tuple(x.shape)}, ({len(pairs) // share}, {inner}) needed"
    )
    assert experts.dtype == torch.int64, f"experts are {experts.dtype}, int64 needed"
    assert w.dtype == x.dtype, f"w is {w.dtype}, x is {x.dtype}"
    for name, tensor in (("x", x), ("w", w)):
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}, contiguous needed"
    tile = 16 if len(pairs) <= 32 * count else 64
    order, tile_experts, starts, ends = _tiles(pairs, count, tile)
    y = torch.empty((len(pairs), columns), dtype=x.dtype, device=x.device)
    _grouped_linear_kernel[(triton.cdiv(columns, 128), len(starts))](
        x, w, y, order, tile_experts, starts, ends, columns, inner,
        SHARE=share, BLOCK_M=tile, BLOCK_N=128, BLOCK_K=32 if x.dtype == torch.float32 else 64,
    )  # fmt: skip
    return y
