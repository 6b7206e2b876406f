"""The product of tile.py on a processor's matrix unit: Intel's AMX, for bfloat16.

`tdpbf16ps` adds to a tile of 16 rows and 16 columns of float32 the products of 16 words of each row
with 16 words of each column, at up to eight times the rate of `vdpbf16ps`. Words lie as tile.py has
them. Even and odd elements of a tile's words are summed apart, in order, and then together: a
row's bits depend on nothing but that row here too, but are not those of the vectors. So the shape
of an operand alone decides which unit multiplies it, never the number of rows.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

from typing import Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from tandem_runtime.kernels.compiled import HAS_AMX, compiled

SIDE: Final = 16
"""Rows of a tile, and words of a tile's row."""
ROWS: Final = 2 * SIDE
"""Of one call: two tiles of rows by two of columns use all eight registers."""
_BYTE, _LONG, _POINTER = ir.IntType(8), ir.IntType(64), ir.PointerType()


def _configurations() -> NDArray[np.uint8]:
    """[33, 64]: what `ldtilecfg` takes for so many rows.

    Registers 0 to 3 are sums. Up to 16 rows: 4 is a, 5 to 7 are b, sums lie side by side. More: 4
    and 5 are a, 6 and 7 are b, 0 and 1 are the sums of the first 16 rows.
    """
    table = np.zeros((ROWS + 1, 64), np.uint8)
    table[:, 0] = 1
    table[:, 16:32].view(np.uint16)[:] = 4 * SIDE
    for rows in range(1, ROWS + 1):
        upper, lower = min(rows, SIDE), max(rows - SIDE, 0)
        heights = [upper] * 5 + [SIDE] * 3
        if lower:
            heights = [upper, upper, lower, lower, upper, lower, SIDE, SIDE]
        table[rows, 48:56] = heights
    return table


_CONFIGURATIONS: Final = _configurations()


def _run(builder, name, *arguments):
    """An instruction of the unit, where there is one; registers are numbers."""
    if not HAS_AMX:  # LLVM would not compile what `serves` keeps from running
        return
    values = [ir.Constant(_BYTE, a) if isinstance(a, int) else a for a in arguments]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    found = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(found, values)


@intrinsic
def _configure(typing_context, address):
    """Sizes of the eight registers, which are empty from here on."""

    def emit(context, builder, signature, arguments):
        _run(builder, "ldtilecfg", builder.inttoptr(arguments[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def release(typing_context):
    """Nothing to keep any more: the system need not save the registers."""

    def emit(context, builder, signature, arguments):
        _run(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic(prefer_literal=True)
def _tiles(typing_context, down, across, fresh, c, c_row, a, a_row, b, b_row, n):
    """c[down tiles, across tiles] += a b, from 0 if `fresh`; strides in words, n a multiple of 16.

    `down` and `across` are literals: 1 and up to 4, or 2 and up to 2.
    """
    if not all(isinstance(one, types.IntegerLiteral) for one in (down, across)):
        return None
    rows, columns = down.literal_value, across.literal_value
    right = 4 + rows

    def emit(context, builder, signature, arguments):
        fresh, c, c_row, a, a_row, b, b_row, n = arguments[2:]

        def at(base, stride, row, column):
            """Of a tile; `row` in tiles, `column` in words."""
            offset = builder.add(builder.mul(stride, _LONG(SIDE * row)), column)
            return builder.inttoptr(builder.add(base, builder.shl(offset, _LONG(2))), _POINTER)

        c_bytes, a_bytes, b_bytes = (builder.shl(s, _LONG(2)) for s in (c_row, a_row, b_row))
        sums = [(i, j, 2 * i + j) for i in range(rows) for j in range(columns)]
        with builder.if_else(fresh) as (empty, before):
            with empty:
                for _, _, tile in sums:
                    _run(builder, "tilezero", tile)
            with before:
                for i, j, tile in sums:
                    place = at(c, c_row, i, _LONG(SIDE * j))
                    _run(builder, "tileloadd64", tile, place, c_bytes)
        with cgutils.for_range_slice(builder, _LONG(0), n, _LONG(SIDE)) as (k, _):
            for i in range(rows):
                _run(builder, "tileloadd64", 4 + i, at(a, a_row, i, k), a_bytes)
            below = builder.add(b, builder.shl(builder.mul(b_row, k), _LONG(2)))
            for j in range(columns):
                tile = right + j % (8 - right)
                _run(builder, "tileloadd64", tile, at(below, b_row, 0, _LONG(SIDE * j)), b_bytes)
                for i in range(rows):
                    _run(builder, "tdpbf16ps", 2 * i + j, 4 + i, tile)
        for i, j, tile in sums:
            _run(builder, "tilestored64", tile, at(c, c_row, i, _LONG(SIDE * j)), c_bytes)
        return context.get_dummy_value()

    return types.void(down, across, types.boolean, *[types.int64] * 7), emit


@intrinsic
def serves(typing_context, element):
    """Whether this processor has the unit, for this dtype: a constant."""

    def emit(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), HAS_AMX and element == types.uint16)

    return types.boolean(element), emit


@compiled
def fits(element, n, columns):
    """Whether the unit multiplies operands of this dtype and shape."""
    return serves(element) and (n | columns) % SIDE == 0


@compiled
def _across(fresh, c, c_row, a, a_row, b, b_row, n, rows, columns):
    """c += a b for the rows that the unit is configured for."""
    j = 0
    while j < columns:
        cj, bj = c + 4 * j, b + 4 * j
        if rows > SIDE and columns - j >= 2 * SIDE:
            _tiles(2, 2, fresh, cj, c_row, a, a_row, bj, b_row, n)
            j += 2 * SIDE
        elif rows > SIDE:
            _tiles(2, 1, fresh, cj, c_row, a, a_row, bj, b_row, n)
            j += SIDE
        elif columns - j >= 4 * SIDE:
            _tiles(1, 4, fresh, cj, c_row, a, a_row, bj, b_row, n)
            j += 4 * SIDE
        else:
            _tiles(1, 1, fresh, cj, c_row, a, a_row, bj, b_row, n)
            j += SIDE


@compiled
def configure(rows):
    """For `product_amx` of so many rows, or of any number above ROWS."""
    _configure(_CONFIGURATIONS.ctypes.data + 64 * min(rows, ROWS))


@compiled
def product_amx(fresh, c, c_row, a, a_row, b, b_row, n, rows, columns):
    """tile.py's `product` where `fits` says so, after `configure`."""
    if rows <= ROWS:
        _across(fresh, c, c_row, a, a_row, b, b_row, n, rows, columns)
        return
    for r in range(0, rows, ROWS):
        count = min(rows - r, ROWS)
        configure(count)
        cr, ar = c + 4 * r * c_row, a + 4 * r * a_row
        _across(fresh, cr, c_row, ar, a_row, b, b_row, n, count, columns)
    configure(rows)
