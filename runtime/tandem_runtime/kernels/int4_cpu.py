"""int4_linear.py's formula on the CPU, in bfloat16: a group's sums are float32 and then scaled, so
that no weight is rounded.

The packed weight is read from one end to the other, as linear.py's is: panels of 64 columns, of
each [K / 32, 4, 64] words of 32 bits. Word i of a group and column has the elements 2 (4 i + t) at
bit 4 t and 2 (4 i + t) + 1 at bit 16 + 4 t, t = 0 .. 3: shifted by 4 t, it is a pair of numbers to
look up. Scales and zeros are [panels, K / 32, 2, 64].
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from tandem_runtime.checkpoint.quantization import INT4_GROUP
from tandem_runtime.kernels.compiled import (
    FLOAT,
    HAS_PERMUTE,
    LINE_BYTES,
    WORD,
    compiled,
    fma,
    keep,
    line_in,
    narrow,
    pointer,
    prefetch,
    widen,
)
from tandem_runtime.kernels.int4_linear import unpack_int4
from tandem_runtime.kernels.linear import PANEL
from tandem_runtime.kernels.team import Kernel, empty, share
from tandem_runtime.kernels.tile import LANES, begin, end, product, takes_floats, widen_all

TILE_ROWS: Final = 32
GROUP_BYTES: Final = INT4_GROUP // 2 * PANEL
AHEAD: Final = 4
"""Groups that are fetched before they are needed."""
_WORDS: Final = INT4_GROUP // 2
"""Of a group and column, as tile.py takes them."""
_PAIR_OF_ONES: Final = 0x3F803F80
_LONG: Final = ir.IntType(64)


def pack_int4(values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """q, s and z of int4_linear.py as `int4_linear_cpu` takes them; copies.

    Panel by panel: in between, a weight takes 4 bytes.
    """
    outputs, groups = scales.shape
    panels = -(-outputs // PANEL)
    words = values.new_zeros(panels, groups, 4, PANEL, dtype=torch.int32)
    factors = scales.new_zeros(panels, groups, 2, PANEL)
    shifts = torch.tensor([[4 * t, 16 + 4 * t] for t in range(4)], dtype=torch.int32)
    for panel in range(panels):
        rows = slice(panel * PANEL, min((panel + 1) * PANEL, outputs))
        count = rows.stop - rows.start
        q = unpack_int4(values[rows]).view(count, groups, 4, 4, 2).int()
        words[panel, ..., :count] = (q << shifts).sum((3, 4), dtype=torch.int32).movedim(0, -1)
        factors[panel, :, 0, :count] = scales[rows].T
        factors[panel, :, 1, :count] = zeros[rows].T
    return words, factors


def _looked_up(builder, words):
    """Of each half's lowest four bits, the number less 8 as a bfloat16."""
    if HAS_PERMUTE:
        halves = ir.VectorType(ir.IntType(16), 2 * LANES)
        names = torch.arange(-8, 8).bfloat16().view(torch.int16).tolist()
        table = ir.Constant(halves, [name & 0xFFFF for name in 2 * names])
        kind = ir.FunctionType(halves, [halves, halves])
        name = "llvm.x86.avx512.permvar.hi.512"
        permute = cgutils.get_or_insert_function(builder.module, kind, name)
        found = builder.call(permute, [table, builder.bitcast(words, halves)])
        return builder.bitcast(found, words.type)

    def alike(value):
        return ir.Constant(words.type, [value] * LANES)

    both = []
    for half in (words, builder.lshr(words, alike(16))):
        number = builder.sub(builder.and_(half, alike(15)), alike(8))
        exact = builder.sitofp(number, ir.VectorType(FLOAT, LANES))
        both.append(builder.bitcast(exact, words.type))
    return builder.or_(builder.lshr(both[0], alike(16)), both[1])


@intrinsic
def _unpack(typing_context, source, target):
    """A group of a panel: [4, 64] words of eight numbers to [16, 64] words of two bfloat16."""

    def emit(context, builder, signature, arguments):
        kind = ir.VectorType(WORD, LANES)

        def at(base, line):
            return builder.inttoptr(builder.add(base, _LONG(LINE_BYTES * line)), ir.PointerType())

        for i in range(4):
            for vector in range(PANEL // LANES):
                place = at(arguments[0], 4 * i + vector)
                words = builder.load(place, typ=kind, align=LINE_BYTES)
                for t in range(4):
                    shifted = builder.lshr(words, ir.Constant(kind, [4 * t] * LANES))
                    place = at(arguments[1], 4 * (4 * i + t) + vector)
                    builder.store(_looked_up(builder, shifted), place, align=LINE_BYTES)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@compiled
def _sum_groups(element, x, width, rows, room, sums):
    """Of each group of x, [rows, width] words, its sum: by products with ones. `room`: for
    _WORDS + TILE_ROWS lines."""
    ones, found = pointer(room, np.uint32(0)), pointer(room + _WORDS * LINE_BYTES, np.float32(0))
    for i in range(_WORDS * LANES):
        ones[i] = np.uint32(_PAIR_OF_ONES)
    for row in range(0, rows, TILE_ROWS):
        count, at = min(rows - row, TILE_ROWS), room + _WORDS * LINE_BYTES
        begin(element, count)
        xr = x + 4 * row * width
        product(element, True, at, LANES, xr, width, room, LANES, _WORDS, count, LANES)
        for r in range(count):
            sums[row + r] = found[r * LANES]


def _int4_linear(a, part, element):
    """One panel of TILE_ROWS rows."""
    x, packed, factors, rows, groups, outputs = a[0], a[1], a[2], a[5], a[6], a[7]
    added, target = pointer(a[3], element), pointer(a[4], element)
    panels = (outputs + PANEL - 1) // PANEL
    panel, row = part % panels, part // panels * TILE_ROWS
    columns, count = min(outputs - panel * PANEL, PANEL), min(rows - row, TILE_ROWS)
    floats = takes_floats(element, _WORDS, PANEL)
    width = 2 * _WORDS if floats else _WORDS
    room = count * groups * width if floats else 0
    memory = np.empty(4 * ((_WORDS + 2 * TILE_ROWS) * PANEL + room) + LINE_BYTES, np.uint8)
    words = line_in(memory)
    products = words + 4 * _WORDS * PANEL
    product_of = pointer(products, np.float32(0))
    totals = pointer(products + 4 * TILE_ROWS * PANEL, np.float32(0))
    seen = np.empty(count * groups, np.float32)
    x += 4 * row * groups * _WORDS
    if floats:
        wide = products + 8 * TILE_ROWS * PANEL
        widen_all(element, x, wide, count * groups * width)
        x = wide
    _sum_groups(element, x, width, count * groups, words, seen)
    for i in range(count * PANEL):
        totals[i] = np.float32(0)
    begin(element, count)
    for group in range(groups):
        place = panel * groups + group
        _unpack(packed + place * GROUP_BYTES, words)
        prefetch(packed + (place + AHEAD) * GROUP_BYTES, GROUP_BYTES)
        at, line = x + 4 * group * width, groups * width
        product(element, True, products, PANEL, at, line, words, PANEL, _WORDS, count, PANEL)
        factor = pointer(factors + place * 4 * PANEL, element)
        for r in range(count):
            one = seen[r * groups + group]
            for j in range(PANEL):
                scaled = fma(widen(factor[j]), product_of[r * PANEL + j], totals[r * PANEL + j])
                totals[r * PANEL + j] = fma(widen(factor[PANEL + j]), one, scaled)
    end(element)
    for r in range(count):
        y = (row + r) * outputs + panel * PANEL
        for j in range(columns):
            more = widen(added[panel * PANEL + j]) if a[3] != 0 else np.float32(0)
            target[y + j] = narrow(totals[r * PANEL + j] + more, element)
    keep(memory)


_INT4_LINEAR: Final = Kernel(_int4_linear)


def int4_linear_cpu(
    x: Tensor, packed: Tensor, factors: Tensor, outputs: int, bias: Tensor | None
) -> Tensor:
    """y of int4_linear.py; a row's bits depend on that row alone."""
    rows, inputs = x.shape
    panels, groups = packed.shape[:2]
    assert x.is_contiguous(), f"a linear layer needs contiguous rows, x has strides {x.stride()}"
    assert x.dtype == factors.dtype == torch.bfloat16, f"x is {x.dtype}, scales {factors.dtype}"
    assert inputs == groups * INT4_GROUP, f"x has {inputs} columns, W {groups * INT4_GROUP}"
    y = empty((rows, outputs), x.dtype)
    share(
        _INT4_LINEAR, x.dtype, panels * -(-rows // TILE_ROWS), x.data_ptr(), packed.data_ptr(),
        factors.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, groups,
        outputs,
    )  # fmt: skip
    return y
