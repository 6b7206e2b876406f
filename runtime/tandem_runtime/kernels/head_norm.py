"""Root-mean-square norm of each head, in place: Qwen3's of query and key, before rope.

    x[r, h]' = x[r, h] / sqrt(mean(x[r, h]^2) + eps) * weight[h]

x: [rows, heads, D] (may be a view into wider rows); weight: [heads, D] of x's dtype. Sums in
float32; the normed value is rounded to the dtype before the weight is applied.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


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


def head_norm_triton(x: Tensor, weight: Tensor, eps: float) -> None:
    """The same by one program a row and head."""
    rows, heads, dim = x.shape
    assert x.stride(2) == 1, f"a head's elements must be adjacent, x has strides {x.stride()}"
    assert weight.shape == (heads, dim), f"weight is {tuple(weight.shape)}, ({heads}, {dim}) needed"
    assert weight.is_contiguous(), f"weight has strides {weight.stride()}, contiguous needed"
    assert weight.dtype == x.dtype, f"weight is {weight.dtype}, x is {x.dtype}"
    block = triton.next_power_of_2(dim)
    _head_norm_kernel[(rows, heads)](
        x, weight, x.stride(0), x.stride(1), dim, eps, BLOCK=block, num_warps=1
    )
