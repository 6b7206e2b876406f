"""The linear layer on the CPU: y = x W^T + b, with W packed once.

x: [rows, K]; W: [N, K]; b: [N]; y: [rows, N] of x's dtype, summed in float32. The packed weight is
[N / 64, K / P, 64, P], P elements to a word of 32 bits: panels of 64 columns, which tile.py reads
from one end to the other for a few rows at a time. Columns that fill the last panel are zero.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from tandem_runtime.kernels.compiled import compiled, element_of, narrow, pointer, widen, words_of
from tandem_runtime.kernels.tile import product

PANEL: Final = 64


def pack_linear(weight: Tensor) -> Tensor:
    """[N, K] as `linear_cpu` takes it; a copy."""
    p = words_of(weight.dtype)
    outputs, inputs = weight.shape
    assert inputs % p == 0, f"a row of {inputs} has no whole words of {p}"
    packed = weight.new_zeros(-(-outputs // PANEL), inputs // p, PANEL, p)
    for panel, rows in zip(packed, torch.split(weight, PANEL), strict=True):
        panel[:, : len(rows)] = rows.view(len(rows), inputs // p, p).transpose(0, 1)
    return packed


@compiled
def _linear(element, x, packed, bias, y, rows, inputs, outputs, p):
    words = inputs // p
    sums, target = np.empty(rows * PANEL, np.float32), pointer(y, element)
    added = pointer(bias, element)
    for first in range(0, outputs, PANEL):
        panel = packed + 4 * first * words
        product(element, True, sums.ctypes.data, PANEL, x, words, panel, PANEL, words, rows, PANEL)
        columns = min(outputs - first, PANEL)
        if bias != 0:
            for r in range(rows):
                for j in range(columns):
                    sums[r * PANEL + j] += widen(added[first + j])
        for r in range(rows):
            for j in range(columns):
                target[r * outputs + first + j] = narrow(sums[r * PANEL + j], element)


def linear_cpu(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """y as above; a row's bits depend on that row alone."""
    rows, inputs = x.shape
    panels, words, _, p = packed.shape
    assert x.is_contiguous(), f"a linear layer needs contiguous rows, x has strides {x.stride()}"
    assert x.dtype == packed.dtype, f"x is {x.dtype}, the weight {packed.dtype}"
    assert inputs == words * p, f"x has {inputs} columns, the weight takes {words * p}"
    assert 0 <= panels * PANEL - outputs < PANEL, f"{panels} panels for {outputs} outputs"
    y = torch.empty((rows, outputs), dtype=x.dtype)
    _linear(
        element_of(x), x.data_ptr(), packed.data_ptr(), bias.data_ptr() if bias is not None else 0,
        y.data_ptr(), rows, inputs, outputs, p,
    )  # fmt: skip
    return y
