"""Linear layers of 8-bit weights: fp8 times fp8, or int8 times what the model computes in.

    y[r, n] = sum over groups g of  t[r, g] s[n, g] sum over k in g of  x[r, k] W[n, k]   + b[n]

W: [N, K], float8_e4m3fn or int8; s: [N, groups], groups of K / groups columns; x: [rows, K],
float8_e4m3fn with scales t [rows, groups] (fp8_quantize.py), or any float, whose t is 1; y: [rows,
N]. Products are exact, sums are float32. One kernel streams W once for up to 16 rows, where the
weights' bytes are what a step waits for; more rows of fp8 with one group are torch's.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_runtime.kernels.fp8_quantize import FP8

STREAMED_ROWS: Final = 16
_FACTORS: Final = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    FP8: tl.float16,
}
"""What a tile is multiplied in; float16 holds every e4m3."""


def scaled_linear_reference(
    x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None, t: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y as above."""
    groups = s.shape[1]
    parts = torch.einsum(
        "rgk,ngk->rgn",
        x.float().view(len(x), groups, -1),
        w.float().view(len(w), groups, -1),
    )
    y = (parts * s.float().T * (1.0 if t is None else t[..., None])).sum(1)
    return (y if bias is None else y + bias.float()).to(dtype)


@triton.jit
def _scaled_linear_kernel(
    x, w, s, t, bias, y, rows, columns, inner, groups,
    HAS_BIAS: tl.constexpr, HAS_T: tl.constexpr, GROUPED: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        column = start + k
        x_mask = (m < rows)[:, None] & (column < inner)[None, :]
        w_mask = (n < columns)[None, :] & (column < inner)[:, None]
        a = tl.load(x + m[:, None] * inner + column[None, :], mask=x_mask, other=0.0).to(FACTOR)
        b = tl.load(w + n[None, :] * inner + column[:, None], mask=w_mask, other=0.0)
        b = b.to(FACTOR) if HAS_T else b.to(tl.float32).to(FACTOR)
        if GROUPED:
            part = tl.dot(a, b, input_precision="ieee")
            group = start // BLOCK_K
            part *= tl.load(s + n * groups + group, mask=n < columns, other=0.0)[None, :]
            if HAS_T:
                part *= tl.load(t + m * groups + group, mask=m < rows, other=0.0)[:, None]
            total += part
        else:
            total = tl.dot(a, b, total, input_precision="ieee")
    if not GROUPED:
        total *= tl.load(s + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        if HAS_T:
            total *= tl.load(t + m, mask=m < rows, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(y + m[:, None] * columns + n[None, :], total, mask=mask)


def scaled_linear_triton(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    bias: Tensor | None,
    t: Tensor | None,
    dtype: torch.dtype,
    rows: int,
) -> Tensor:
    """The same for the first `rows` of x, by one program for a tile of rows and columns."""
    (columns, inner), groups = w.shape, s.shape[1]
    assert x.shape[1] == inner, f"x has {x.shape[1]} columns, w {inner}"
    assert w.dtype in (FP8, torch.int8), f"w is {w.dtype}, {FP8} or torch.int8 needed"
    assert (x.dtype == FP8) == (w.dtype == FP8) == (t is not None), (
        f"w of {w.dtype} needs x of {'fp8 with scales' if w.dtype == FP8 else 'floats'}, "
        f"got {x.dtype}"
    )
    assert s.shape == (columns, groups), f"s is {tuple(s.shape)}, ({columns}, groups) needed"
    assert groups == 1 or inner // groups in (64, 128), f"groups of {inner // groups} columns"
    for name, tensor in (("x", x), ("w", w), ("s", s)):
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}, contiguous needed"
    y = torch.empty((rows, columns), dtype=dtype, device=x.device)
    few = rows <= STREAMED_ROWS
    block_m, block_n = (16, 16) if few else (64, 64)
    block_k = (256 if few else 64) if groups == 1 else inner // groups
    _scaled_linear_kernel[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m))](
        x, w, s, s if t is None else t, s if bias is None else bias, y,
        rows, columns, inner, groups,
        HAS_BIAS=bias is not None, HAS_T=t is not None, GROUPED=groups > 1,
        FACTOR=_FACTORS[x.dtype],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y
