"""Linear layers of 4-bit weights.

    y[r, n] = sum over groups g of  s[n, g] sum over k in g of x[r, k] (q[n, k] - 8)
                                    + z[n, g] sum over k in g of x[r, k]                + b[n]

q: [N, K / 2] uint8, groups of 32 columns in 16 bytes: byte b has the group's column b in its low
half and b + 16 in its high half; s, z: [N, K / 32]; x: [rows, K]; y: [rows, N] of x's dtype.
Products are exact, sums are float32: a group's product comes before its scale, so that no weight is
rounded on the way.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_runtime.checkpoint.quantization import INT4_GROUP
from tandem_runtime.kernels.scaled_linear import STREAMED_ROWS


def unpack_int4(q: Tensor) -> Tensor:
    """[N, K] uint8, 0 to 15."""
    halves = q.view(len(q), -1, 1, INT4_GROUP // 2)
    return torch.cat((halves & 15, halves >> 4), 2).flatten(1)


def int4_linear_reference(
    x: Tensor, q: Tensor, s: Tensor, z: Tensor, bias: Tensor | None
) -> Tensor:
    """y as above."""
    w = unpack_int4(q).view(*s.shape, INT4_GROUP).float() - 8
    w = (w * s.float()[..., None] + z.float()[..., None]).flatten(1)
    y = x.float() @ w.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@triton.jit
def _int4_linear_kernel(
    x, q, s, z, bias, y, rows, columns, groups,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.arange(0, 16)
    x_at = x + m[:, None] * (groups * 32) + k[None, :]
    q_at = q + n[None, :] * (groups * 16) + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, groups):
        low_x = tl.load(x_at, mask=(m < rows)[:, None], other=0.0)
        high_x = tl.load(x_at + 16, mask=(m < rows)[:, None], other=0.0)
        packed = tl.load(q_at, mask=(n < columns)[None, :], other=0).to(tl.int32)
        low_q = ((packed & 15) - 8).to(tl.float32).to(x.dtype.element_ty)
        high_q = ((packed >> 4) - 8).to(tl.float32).to(x.dtype.element_ty)
        part = tl.dot(low_x, low_q, input_precision="ieee")
        part = tl.dot(high_x, high_q, part, input_precision="ieee")
        seen = tl.sum(low_x.to(tl.float32) + high_x.to(tl.float32), axis=1)
        scale = tl.load(s + n * groups + group, mask=n < columns, other=0.0).to(tl.float32)
        zero = tl.load(z + n * groups + group, mask=n < columns, other=0.0).to(tl.float32)
        total += part * scale[None, :] + seen[:, None] * zero[None, :]
        x_at += 32
        q_at += 16
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(y + m[:, None] * columns + n[None, :], total, mask=mask)


def int4_linear_triton(x: Tensor, q: Tensor, s: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """The same by one program for a tile of rows and columns."""
    (rows, inner), columns = x.shape, len(q)
    assert inner % INT4_GROUP == 0, f"x has {inner} columns, a multiple of {INT4_GROUP} needed"
    assert q.shape == (columns, inner // 2), f"q is {tuple(q.shape)}, x has {inner} columns"
    assert q.dtype == torch.uint8, f"q is {q.dtype}, torch.uint8 needed"
    for name, tensor in (("s", s), ("z", z)):
        assert tensor.shape == (columns, inner // INT4_GROUP), (
            f"{name} is {tuple(tensor.shape)}, ({columns}, {inner // INT4_GROUP}) needed"
        )
    for name, tensor in (("x", x), ("q", q), ("s", s), ("z", z)):
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}, contiguous needed"
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block_m, block_n = (16, 16) if rows <= STREAMED_ROWS else (64, 64)
    _int4_linear_kernel[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m))](
        x, q, s, z, s if bias is None else bias, y, rows, columns, inner // INT4_GROUP,
        HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y
