"""Put a step's new keys and values into their slots of the paged cache.

    cache[i, slot // T, head, slot % T] = kv[row, i, head]      (i = 0: keys, i = 1: values)

kv: [rows, 2, kv heads, D] (may be a view into wider rows); cache: one layer's
[2, blocks, kv heads, T, D], of kv's dtype or fp8 (fp8_kv.py); slots: [rows] int64. Rows of padding
carry slots of the scrap block.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_runtime.kernels.fp8_kv import to_pool
from tandem_runtime.kernels.fp8_quantize import FP8


def store_kv_reference(kv: Tensor, planes: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """Write kv into the cache's keys and values, two views [blocks, kv heads, T, D]."""
    block_tokens = planes[0].shape[2]
    blocks, offsets = slots // block_tokens, slots % block_tokens
    kv = to_pool(kv, planes[0].dtype)
    # Advanced indices apart from each other come first: [rows, heads, D].
    planes[0][blocks, :, offsets] = kv[:, 0]
    planes[1][blocks, :, offsets] = kv[:, 1]


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _store_kv_kernel(
    kv, cache, slots, kv_row, kv_plane, kv_head, plane_stride, block_stride, head_stride, dim,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr, FP8_POOL: tl.constexpr,
):  # fmt: skip
    row, plane = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    slot = tl.load(slots + row)
    column = tl.arange(0, BLOCK_DIM)
    inside = column < dim
    source = kv + row * kv_row + plane * kv_plane + head * kv_head + column
    target = (
        cache
        + plane * plane_stride
        + (slot // BLOCK_TOKENS) * block_stride
        + head * head_stride
        + (slot % BLOCK_TOKENS) * dim
        + column
    )
    value = tl.load(source, mask=inside)
    if FP8_POOL:
        wide = value.to(tl.float32)
        wide = tl.clamp(wide, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        value = wide.to(tl.float8e4nv)
    tl.store(target, value, mask=inside)


def store_kv_triton(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    """The same by one program for a row, plane and head."""
    rows, planes, heads, dim = kv.shape
    assert planes == 2, f"kv is {tuple(kv.shape)}, [rows, 2, heads, dim] needed"
    assert cache.ndim == 5, f"cache is {tuple(cache.shape)}, [2, blocks, heads, tokens, dim] needed"
    assert cache.shape[2] == heads, f"kv has {heads} heads, the cache {cache.shape[2]}"
    assert cache.shape[4] == dim, f"kv has head dim {dim}, the cache {cache.shape[4]}"
    assert cache.is_contiguous(), f"one layer's cache must be contiguous, got {cache.stride()}"
    assert cache.dtype in (kv.dtype, FP8), f"kv is {kv.dtype}, the cache {cache.dtype}"
    assert kv.stride(3) == 1, f"a head's elements must be adjacent, kv has strides {kv.stride()}"
    assert slots.shape == (rows,), f"{tuple(slots.shape)} slots for {rows} rows"
    assert slots.dtype == torch.int64, f"slots are {slots.dtype}, int64 needed"
    _store_kv_kernel[(rows, 2, heads)](
        kv,
        cache,
        slots,
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        dim,
        BLOCK_TOKENS=cache.shape[3],
        BLOCK_DIM=triton.next_power_of_2(dim),
        FP8_POOL=cache.dtype == FP8,
        num_warps=1,
    )
