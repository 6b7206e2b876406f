"""Put a step's new keys and values into their slots of the paged cache.

    cache[0, slot // T, head, slot % T] = k[row, head];  cache[1, ...] = v[row, head]

k, v: [rows, kv heads, D] (may be views into wider rows); cache: one layer's
[2, blocks, kv heads, T, D]; slots: [rows] int64. Rows of padding carry slots of the scrap block.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def store_kv_reference(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write k and v into `cache`."""
    block_tokens = cache.shape[3]
    block, offset = slots // block_tokens, slots % block_tokens
    cache[0][block, :, offset] = k
    cache[1][block, :, offset] = v


@triton.jit
def _store_kv_kernel(
    k, v, cache, slots, k_row, k_head, v_row, v_head, value_plane, block_stride, head_stride,
    dim, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    column = tl.arange(0, BLOCK_DIM)
    inside = column < dim
    target = (
        cache
        + (slot // BLOCK_TOKENS) * block_stride
        + head * head_stride
        + (slot % BLOCK_TOKENS) * dim
        + column
    )
    key = tl.load(k + row * k_row + head * k_head + column, mask=inside)
    value = tl.load(v + row * v_row + head * v_head + column, mask=inside)
    tl.store(target, key, mask=inside)
    tl.store(target + value_plane, value, mask=inside)


def store_kv_triton(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """The same by one program a row and head."""
    rows, heads, dim = k.shape
    assert v.shape == k.shape, f"k is {tuple(k.shape)}, v is {tuple(v.shape)}"
    assert cache.ndim == 5, f"cache is {tuple(cache.shape)}, [2, blocks, heads, tokens, dim] needed"
    assert cache.shape[2] == heads, f"k has {heads} heads, the cache {cache.shape[2]}"
    assert cache.shape[4] == dim, f"k has head dim {dim}, the cache {cache.shape[4]}"
    assert cache.is_contiguous(), f"one layer's cache must be contiguous, got {cache.stride()}"
    assert cache.dtype == k.dtype == v.dtype, f"k {k.dtype}, v {v.dtype}, cache {cache.dtype}"
    assert k.stride(2) == v.stride(2) == 1, "a head's elements must be adjacent"
    assert slots.shape == (rows,), f"{tuple(slots.shape)} slots for {rows} rows"
    assert slots.dtype == torch.int64, f"slots are {slots.dtype}, int64 needed"
    _store_kv_kernel[(rows, heads)](
        k,
        v,
        cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        dim,
        BLOCK_TOKENS=cache.shape[3],
        BLOCK_DIM=triton.next_power_of_2(dim),
        num_warps=1,
    )
