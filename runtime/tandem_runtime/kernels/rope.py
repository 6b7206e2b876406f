"""Rotary position embedding, in place, on halves (as Hugging Face checkpoints store them).

    x1, x2 = x[..., :D/2], x[..., D/2:]
    x1', x2' = x1 cos - x2 sin, x2 cos + x1 sin

x: [rows, heads, D] (may be a view into wider rows); cos, sin: [rows, D] float32, those of each
row's position for both halves, the sine negated for the first. Arithmetic in float32.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_runtime.kernels.compiled import narrow, pointer, widen
from tandem_runtime.kernels.team import PART_ROWS, Kernel, share_rows


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `x` in place."""
    wide = x.float()
    swapped = wide.roll(x.shape[-1] // 2, -1)
    x.copy_(wide.mul_(cos[:, None]).addcmul_(swapped, sin[:, None]))


@triton.jit
def _rope_kernel(x, cos, sin, row_stride, head_stride, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = x + row * row_stride + tl.program_id(1) * head_stride
    column = tl.arange(0, BLOCK)
    inside = column < half
    angle = row * 2 * half + column
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + half + angle, mask=inside, other=0.0)
    x1 = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(start + half + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(start + column, x1 * c - x2 * s, mask=inside)
    tl.store(start + half + column, x2 * c + x1 * s, mask=inside)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    rows, _, dim = x.shape
    assert x.stride(2) == 1, f"a head's elements must be adjacent, x has strides {x.stride()}"
    for name, table in (("cos", cos), ("sin", sin)):
        assert table.shape == (rows, dim), f"{name} is {tuple(table.shape)}, ({rows}, {dim}) needed"
        assert table.dtype == torch.float32, f"{name} is {table.dtype}, float32 needed"
        assert table.is_contiguous(), f"{name} has strides {table.stride()}, contiguous needed"


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same by one program a row and head."""
    rows, heads, dim = x.shape
    _check(x, cos, sin)
    _rope_kernel[(rows, heads)](
        x,
        cos,
        sin,
        x.stride(0),
        x.stride(1),
        dim // 2,
        BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )


def _rope_rows(a, part, element):
    rows, heads, dim = a[0], a[1], a[2]
    values, half = pointer(a[3], element), dim // 2
    row_stride, head_stride = a[4], a[5]
    c = pointer(a[6], np.float32(0))
    s = pointer(a[7], np.float32(0))
    first = part * PART_ROWS
    for row in range(first, min(first + PART_ROWS, rows)):
        for head in range(heads):
            start, angle = row * row_stride + head * head_stride, row * dim
            for i in range(half):
                x1, x2 = widen(values[start + i]), widen(values[start + half + i])
                y1 = x1 * c[angle + i] + x2 * s[angle + i]
                y2 = x2 * c[angle + half + i] + x1 * s[angle + half + i]
                values[start + i] = narrow(y1, element)
                values[start + half + i] = narrow(y2, element)


_ROPE: Final = Kernel(_rope_rows)


def rope_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same, row by row, on the CPU."""
    rows, heads, dim = x.shape
    _check(x, cos, sin)
    share_rows(
        _ROPE, x.dtype, rows, heads, dim, x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(),
        sin.data_ptr(),
    )  # fmt: skip
