"""Root-mean-square norm, with the residual added first.

    r = x + residual                      (kept as the new residual; r = x without one)
    y = r / sqrt(mean(r^2) + eps) * weight

x, residual, y: [rows, hidden]; weight: [hidden]. Sums in float32; r is rounded to x's dtype before
it is squared, so that the residual that is stored is the one that was normed.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from tandem_runtime.kernels.compiled import (
    as_float,
    compiled,
    float_bits,
    fma,
    narrow,
    pointer,
    widen,
)
from tandem_runtime.kernels.team import PART_ROWS, Kernel, empty, share_rows


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """y as above; `residual` is updated in place."""
    if residual is not None:
        x = residual.add_(x)
    return functional.rms_norm(x, weight.shape, weight, eps)


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, y, hidden, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    r = tl.load(x + row + column, mask=inside, other=0.0)
    wide = r.to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        r = wide.to(r.dtype)
        tl.store(residual + row + column, r, mask=inside)
        wide = r.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * scale).to(r.dtype).to(tl.float32)
    tl.store(y + row + column, normed * w, mask=inside)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    hidden = x.shape[1]
    assert x.is_contiguous(), f"rms_norm needs contiguous rows, x has strides {x.stride()}"
    assert weight.shape == (hidden,), f"weight is {tuple(weight.shape)}, rows have {hidden}"
    assert weight.dtype == x.dtype, f"weight is {weight.dtype}, x is {x.dtype}"
    if residual is not None:
        assert residual.shape == x.shape, f"residual is {tuple(residual.shape)}, x {tuple(x.shape)}"
        assert residual.is_contiguous(), f"residual has strides {residual.stride()}"
        assert residual.dtype == x.dtype, f"residual is {residual.dtype}, x is {x.dtype}"


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """The same by one program a row."""
    rows, hidden = x.shape
    _check(x, weight, residual)
    y = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(rows,)](
        x,
        residual if residual is not None else x,
        weight,
        y,
        hidden,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return y


@compiled
def norm(element, wide, n, eps, weight, target):
    """y as above of one row r, which is in `wide`, float32; addresses of weight and y."""
    scale, y = pointer(weight, element), pointer(target, element)
    lanes = np.zeros(64, np.float32)
    whole = n // 64 * 64
    for begin in range(0, whole, 64):
        for lane in range(64):
            lanes[lane] = fma(wide[begin + lane], wide[begin + lane], lanes[lane])
    for i in range(whole, n):
        lanes[i - whole] = fma(wide[i], wide[i], lanes[i - whole])
    total = np.float32(0)
    for lane in range(64):
        total += lanes[lane]
    factor = np.float32(1) / np.sqrt(total / np.float32(n) + eps)
    for i in range(n):
        normed = widen(narrow(wide[i] * factor, element))
        y[i] = narrow(normed * widen(scale[i]), element)


def _rms_norm_rows(a, part, element):
    rows, hidden, item = a[0], a[1], a[7]
    source, kept = pointer(a[2], element), pointer(a[4], element)
    eps, has_residual = as_float(a[6]), a[4] != 0
    wide = np.empty(hidden, np.float32)
    first = part * PART_ROWS
    for start in range(first * hidden, min(first + PART_ROWS, rows) * hidden, hidden):
        for i in range(hidden):
            wide[i] = widen(source[start + i])
        if has_residual:
            for i in range(hidden):
                r = narrow(wide[i] + widen(kept[start + i]), element)
                kept[start + i] = r
                wide[i] = widen(r)
        norm(element, wide, hidden, eps, a[3], a[5] + start * item)


_RMS_NORM: Final = Kernel(_rms_norm_rows)


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The same, row by row, on the CPU."""
    rows, hidden = x.shape
    _check(x, weight, residual)
    y = empty(x.shape, x.dtype)
    share_rows(
        _RMS_NORM, x.dtype, rows, hidden, x.data_ptr(), weight.data_ptr(),
        0 if residual is None else residual.data_ptr(), y.data_ptr(), float_bits(eps),
        x.itemsize,
    )  # fmt: skip
    return y
