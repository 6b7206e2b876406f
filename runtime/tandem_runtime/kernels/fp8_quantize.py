"""A step's rows in 8 bits, with scales of their own.

    s[r, g] = min(max|x[r, k]|, bound) / 448        over the columns k of group g
    q[r, k] = e4m3(x[r, k] / s[r, g])               rounded to even, at most 448

x: [rows, K]; q: [padded rows, K] float8_e4m3fn; s: [padded rows, groups] float32, groups of K /
groups columns. Rows are padded to sixteens, which torch's product needs; padding is 0, its scale 1.
A bound below the row's largest value lets outliers saturate, as checkpoints of fbgemm were made to.
What is no number stays none, so that its stream is ended.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from math import inf
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
ROW_GRAIN: Final = 16
_SMALLEST: Final = 1e-10
"""A row of zeros has no scale of its own."""


def fp8_quantize_reference(x: Tensor, groups: int = 1, bound: float = inf) -> tuple[Tensor, Tensor]:
    """(q, s) as above, without padding."""
    wide = x.float().view(len(x), groups, -1)
    scales = wide.abs().amax(2).clamp(_SMALLEST, bound) / FP8_MAX
    q = (wide / scales[..., None]).clamp_(-FP8_MAX, FP8_MAX)
    return q.view(x.shape).to(FP8), scales


@triton.jit
def _fp8_quantize_kernel(x, q, s, rows, columns, bound, smallest, BLOCK: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = (row * tl.num_programs(1) + group) * columns + column
    value = tl.load(x + at, mask=inside & (row < rows), other=0.0).to(tl.float32)
    scale = tl.minimum(tl.maximum(tl.max(tl.abs(value), axis=0), smallest), bound)
    scale = tl.where(row < rows, tl.div_rn(scale, 448.0), 1.0)
    value = tl.div_rn(value, tl.zeros_like(value) + scale)
    value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(q + at, value.to(tl.float8e4nv), mask=inside)
    tl.store(s + row * tl.num_programs(1) + group, scale)


def fp8_quantize_triton(x: Tensor, groups: int = 1, bound: float = inf) -> tuple[Tensor, Tensor]:
    """The same, padded, by one program for a row and group."""
    rows, inner = x.shape
    assert x.is_contiguous(), f"x has strides {x.stride()}, contiguous needed"
    assert inner % groups == 0, f"{inner} columns cannot be {groups} groups"
    padded = -(-rows // ROW_GRAIN) * ROW_GRAIN
    q = torch.empty((padded, inner), dtype=FP8, device=x.device)
    s = torch.empty((padded, groups), dtype=torch.float32, device=x.device)
    columns = inner // groups
    block = triton.next_power_of_2(columns)
    warps = min(max(block // 1024, 1), 16)
    _fp8_quantize_kernel[(padded, groups)](
        x, q, s, rows, columns, bound, _SMALLEST, BLOCK=block, num_warps=warps
    )
    return q, s
