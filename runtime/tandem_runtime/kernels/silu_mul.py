"""The SwiGLU activation: y = silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

gate_up: [rows, 2 * width], gate first; y: [rows, width]. silu is computed in float32 and rounded
to the dtype before the product.
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

from tandem_runtime.kernels.compiled import exp2, narrow, pointer, widen
from tandem_runtime.kernels.team import PART_ROWS, Kernel, empty, share_rows


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """y as above."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@triton.jit
def _silu_mul_kernel(gate_up, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0)
    # The activation is rounded as in the reference (and in Hugging Face's models).
    act = (gate / (1.0 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(y + row * width + column, act * up.to(tl.float32), mask=inside)


def _check(gate_up: Tensor) -> None:
    double = gate_up.shape[1]
    assert double % 2 == 0, f"gate_up has {double} columns: gate and up need one width"
    assert gate_up.is_contiguous(), f"silu_mul needs contiguous rows, got {gate_up.stride()}"


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """The same by one program for 1024 columns of a row."""
    rows, double = gate_up.shape
    _check(gate_up)
    width, block = double // 2, 1024
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, y, width, BLOCK=block)
    return y


def _silu_mul_rows(a, part, element):
    rows, width = a[0], a[1]
    source, target = (
        pointer(a[2], element),
        pointer(a[3], element),
    )
    first = part * PART_ROWS
    for row in range(first, min(first + PART_ROWS, rows)):
        start = 2 * row * width
        for i in range(width):
            gate, up = widen(source[start + i]), widen(source[start + width + i])
            power = exp2(gate * np.float32(-1.4426950408889634))
            act = widen(narrow(gate / (np.float32(1) + power), element))
            target[row * width + i] = narrow(act * up, element)


_SILU_MUL: Final = Kernel(_silu_mul_rows)


def silu_mul_cpu(gate_up: Tensor) -> Tensor:
    """The same, row by row, on the CPU."""
    rows, double = gate_up.shape
    _check(gate_up)
    width = double // 2
    y = empty((rows, width), gate_up.dtype)
    share_rows(_SILU_MUL, gate_up.dtype, rows, width, gate_up.data_ptr(), y.data_ptr())
    return y
