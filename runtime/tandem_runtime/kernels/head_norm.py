"""Root-mean-square norm of each head, in place: Qwen3's of query and key, before rope.

    x[r, h]' = x[r, h] / sqrt(mean(x[r, h]^2) + eps) * weight[h]

x: [rows, heads, D] (may be a view into wider rows); weight: [heads, D] of x's dtype. Sums in
float32; the normed value is rounded to the dtype before the weight is applied.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Final

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from tandem_runtime.kernels.compiled import as_float, float_bits, pointer, widen
from tandem_runtime.kernels.rms_norm import norm
from tandem_runtime.kernels.team import PART_ROWS, Kernel, share_rows


def head_norm_reference(x: Tensor, weight: Tensor, eps: float) -> None:
    """Norm `x` in place."""
    x.copy_(functional.rms_norm(x, x.shape[-1:], eps=eps) * weight)


@triton.jit
def _head_norm_kernel(x, weight, row_stride, head_stride, dim, eps, BLOCK: tl.constexpr):
    head = tl.program_id(1)
    start = x + tl.program_id(0).to(tl.int64) * row_stride + head * head_stride
    column = tl.arange(0, BLOCK)
    inside = column < dim
    value = tl.load(start + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    w = tl.load(weight + head * dim + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    tl.store(start + column, normed * w, mask=inside)


def _check(x: Tensor, weight: Tensor) -> None:
    _, heads, dim = x.shape
    assert x.stride(2) == 1, f"a head's elements must be adjacent, x has strides {x.stride()}"
    assert weight.shape == (heads, dim), f"weight is {tuple(weight.shape)}, ({heads}, {dim}) needed"
    assert weight.is_contiguous(), f"weight has strides {weight.stride()}, contiguous needed"
    assert weight.dtype == x.dtype, f"weight is {weight.dtype}, x is {x.dtype}"


def head_norm_triton(x: Tensor, weight: Tensor, eps: float) -> None:
    """The same by one program a row and head."""
    rows, heads, dim = x.shape
    _check(x, weight)
    block = triton.next_power_of_2(dim)
    _head_norm_kernel[(rows, heads)](
        x, weight, x.stride(0), x.stride(1), dim, eps, BLOCK=block, num_warps=1
    )


def _head_norm_rows(a, part, element):
    rows, heads, dim, item = a[0], a[1], a[2], a[3]
    wide, first = np.empty(dim, np.float32), part * PART_ROWS
    for row in range(first, min(first + PART_ROWS, rows)):
        for head in range(heads):
            at = a[4] + (row * a[5] + head * a[6]) * item
            values = pointer(at, element)
            for i in range(dim):
                wide[i] = widen(values[i])
            norm(element, wide, dim, as_float(a[8]), a[7] + head * dim * item, at)


_HEAD_NORM: Final = Kernel(_head_norm_rows)


def head_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> None:
    """The same, row by row, on the CPU."""
    rows, heads, dim = x.shape
    _check(x, weight)
    share_rows(
        _HEAD_NORM, x.dtype, rows, heads, dim, x.itemsize, x.data_ptr(), x.stride(0), x.stride(1),
        weight.data_ptr(), float_bits(eps),
    )  # fmt: skip
