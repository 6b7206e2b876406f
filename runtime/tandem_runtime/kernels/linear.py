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

from tandem_runtime.kernels.compiled import (
    LINE_BYTES,
    keep,
    line_in,
    narrow,
    pointer,
    widen,
    words_of,
)
from tandem_runtime.kernels.team import Kernel, empty, share
from tandem_runtime.kernels.tile import begin, end, product, takes_floats, widen_all

PANEL: Final = 64
BLOCK_BYTES: Final = 768 << 10
"""Of rows that all panels are multiplied by in turn: they stay in the processor's cache."""
TILE_ROWS: Final = 96
"""Whose sums are kept at once; whole tiles of either unit."""
WIDE_ROWS: Final = 24
"""The same of rows that are widened first: they stay in the processor's cache, too."""


def pack_linear(weight: Tensor) -> Tensor:
    """[N, K] as `linear_cpu` takes it; a copy."""
    p = words_of(weight.dtype)
    outputs, inputs = weight.shape
    assert inputs % p == 0, f"a row of {inputs} has no whole words of {p}"
    packed = weight.new_zeros(-(-outputs // PANEL), inputs // p, PANEL, p)
    for panel, rows in zip(packed, torch.split(weight, PANEL), strict=True):
        panel[:, : len(rows)] = rows.view(len(rows), inputs // p, p).transpose(0, 1)
    return packed


def _linear(a, part, element):
    """A block of rows by one panel."""
    x, packed, rows, inputs, outputs, p, block_rows = a[0], a[1], a[4], a[5], a[6], a[7], a[8]
    added, target = pointer(a[2], element), pointer(a[3], element)
    words, panels = inputs // p, (outputs + PANEL - 1) // PANEL
    first, top = part % panels * PANEL, part // panels * block_rows
    columns, panel = min(outputs - first, PANEL), packed + 4 * first * words
    floats = takes_floats(element, words, PANEL)
    tile, width = (WIDE_ROWS, inputs) if floats else (TILE_ROWS, words)
    room = min(tile, rows) * inputs if floats else 0
    memory = np.empty((tile * PANEL + room) * 4 + LINE_BYTES, np.uint8)
    c = line_in(memory)
    sums = pointer(c, np.float32(0))
    for row in range(top, min(top + block_rows, rows), tile):
        count = min(tile, rows - row)
        at = x + 4 * row * words
        if floats:
            widen_all(element, at, c + 4 * tile * PANEL, count * inputs)
            at = c + 4 * tile * PANEL
        begin(element, count)
        product(element, True, c, PANEL, at, width, panel, PANEL, words, count, PANEL)
        if a[2] != 0:
            for r in range(count):
                for j in range(columns):
                    sums[r * PANEL + j] += widen(added[first + j])
        for r in range(count):
            at = (row + r) * outputs + first
            for j in range(columns):
                target[at + j] = narrow(sums[r * PANEL + j], element)
    end(element)
    keep(memory)


_LINEAR: Final = Kernel(_linear)


def linear_cpu(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """y as above; a row's bits depend on that row alone."""
    rows, inputs = x.shape
    panels, words, _, p = packed.shape
    assert x.is_contiguous(), f"a linear layer needs contiguous rows, x has strides {x.stride()}"
    assert x.dtype == packed.dtype, f"x is {x.dtype}, the weight {packed.dtype}"
    assert inputs == words * p, f"x has {inputs} columns, the weight takes {words * p}"
    assert 0 <= panels * PANEL - outputs < PANEL, f"{panels} panels for {outputs} outputs"
    y = empty((rows, outputs), x.dtype)
    block_rows = max(BLOCK_BYTES // (4 * words * TILE_ROWS), 1) * TILE_ROWS
    share(
        _LINEAR, x.dtype, panels * -(-rows // block_rows),
        x.data_ptr(), packed.data_ptr(), bias.data_ptr() if bias is not None else 0, y.data_ptr(),
        rows, inputs, outputs, p, block_rows,
    )  # fmt: skip
    return y
