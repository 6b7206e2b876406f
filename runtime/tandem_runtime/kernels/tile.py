"""The product that the CPU's kernels are made of: c += a b, some rows of a at a time, in registers.

Operands are 32-bit words along the summed dimension: pairs of a 16-bit dtype, or one float32. a is
[rows, n] words; b is [n, columns] words, so that a vector of b holds the same pair of 16 columns:

    c[r, j] += a[r, i, 0] b[i, j, 0] + a[r, i, 1] b[i, j, 1]        i = 0 .. n - 1, c in float32

`vdpbf16ps` does that for bfloat16 where the processor is quick at it. Elsewhere the halves of b's
words are widened and multiplied one after the other, and callers widen a, once for all columns.
Every c[r, j] is one chain of sums in the order of i, whatever the other rows: its bits depend on
nothing else. Where a processor has a matrix unit, that multiplies operands which are whole tiles of
it (amx.py).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

from typing import Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tandem_runtime.kernels.amx import configure, fits, product_amx, release, serves
from tandem_runtime.kernels.compiled import (
    FLOAT,
    HAS_PAIRS,
    WORD,
    compiled,
    fetch,
    fma_of,
    pointer,
    widen,
)

LANES: Final = 16
"""Of a vector. Tiles are up to 12 rows of 2 vectors: 24 sums, in 32 registers."""
AHEAD: Final = 24
"""Rows of b that are fetched before they are multiplied: 6 KB of a weight's panel."""
_LONG: Final = ir.IntType(64)


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def _wide(element):
    """Whether products are of halves that were widened to float32."""
    return element == types.int16 or (element == types.uint16 and not HAS_PAIRS)


def _pairs(builder, total, a, b):
    """total + the products of each lane's two bfloat16."""
    pairs = ir.VectorType(_Bfloat(), 2 * LANES)
    kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    dot = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(dot, [total, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])


def _fused(builder, total, a, b):
    """total + a b, of floats."""
    a, b = (builder.bitcast(value, total.type) for value in (a, b))
    return builder.call(fma_of(builder, total.type), [a, b, total])


def _spread(builder, place, words):
    """The word there, in all lanes."""
    nothing = ir.Constant(words, ir.Undefined)
    first = builder.insert_element(nothing, builder.load(place, typ=WORD, align=4), WORD(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(words, [0] * words.count))


def _half(builder, element, word, half, floats, words):
    """The lower or upper half of each word, as a float32."""
    if element == types.uint16:
        keep = ir.Constant(words, [0xFFFF0000 if half else 16] * words.count)
        return builder.bitcast((builder.and_ if half else builder.shl)(word, keep), floats)
    word = builder.lshr(word, ir.Constant(words, [16] * words.count)) if half else word
    bits = builder.trunc(word, ir.VectorType(ir.IntType(16), words.count))
    halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), words.count))
    return builder.fpext(halves, floats)


@intrinsic(prefer_literal=True)
def _tile(typing_context, element, rows, vectors, lanes, fresh, c, c_row, a, a_row, b, b_row, n):
    """c[rows, vectors * lanes] += a b, from 0 if `fresh`; the three are literals."""
    literals = (rows, vectors, lanes)
    if not all(isinstance(one, types.IntegerLiteral) for one in literals):
        return None
    r_count, v_count, width = (one.literal_value for one in literals)
    widened = _wide(element)
    by_pairs = element == types.uint16 and not widened and width == LANES
    by_halves = element != types.float32 and not by_pairs
    add, step = _pairs if by_pairs else _fused, 2 if widened else 1

    def emit(context, builder, signature, arguments):
        fresh, c, c_row, a, a_row, b, b_row, n = arguments[4:]
        floats, words = ir.VectorType(FLOAT, width), ir.VectorType(WORD, width)

        def at(base, stride, row, column):
            offset = builder.add(builder.mul(stride, row), column)
            address = builder.add(base, builder.shl(offset, _LONG(2)))
            return builder.inttoptr(address, ir.PointerType())

        sums = {}
        for r in range(r_count):
            for v in range(v_count):
                place = at(c, c_row, _LONG(r), _LONG(v * width))
                sums[r, v] = place, cgutils.alloca_once(builder, floats)
                before = builder.load(place, typ=floats, align=4)
                nothing = ir.Constant(floats, [0.0] * width)
                builder.store(builder.select(fresh, nothing, before), sums[r, v][1])
        with cgutils.for_range(builder, n) as loop:
            columns = [
                builder.load(at(b, b_row, loop.index, _LONG(v * width)), typ=words, align=4)
                for v in range(v_count)
            ]
            ahead = builder.add(loop.index, _LONG(AHEAD))
            for v in range(v_count):
                fetch(builder, at(b, b_row, ahead, _LONG(v * width)), 1)
            for half in range(2 if by_halves else 1):
                right = [
                    _half(builder, element, word, half, floats, words) if by_halves else word
                    for word in columns
                ]
                word = builder.add(builder.mul(loop.index, _LONG(step)), _LONG(half * (step - 1)))
                for r in range(r_count):
                    left = _spread(builder, at(a, a_row, _LONG(r), word), words)
                    if by_halves and not widened:
                        left = _half(builder, element, left, half, floats, words)
                    for v in range(v_count):
                        _, kept = sums[r, v]
                        total = builder.load(kept, typ=floats)
                        builder.store(add(builder, total, left, right[v]), kept)
        for place, kept in sums.values():
            builder.store(builder.load(kept, typ=floats), place, align=4)
        return context.get_dummy_value()

    return types.void(element, *literals, types.boolean, *[types.int64] * 7), emit


@intrinsic
def _widens(typing_context, element):
    """`_wide`, as a constant."""

    def emit(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), _wide(element))

    return types.boolean(element), emit


@compiled
def takes_floats(element, n, columns):
    """Whether `product` takes a as float32 for a b of this dtype and shape: twice as many words."""
    return _widens(element) and not fits(element, n, columns)


@compiled
def widen_all(element, source, target, count):
    """So many elements as float32, from one address to another."""
    elements, floats = pointer(source, element), pointer(target, np.float32(0))
    for i in range(count):
        floats[i] = widen(elements[i])


@compiled
def begin(element, rows):
    """Before products of so many rows each."""
    if serves(element):
        configure(rows)


@compiled
def end(element):
    """After the last of them."""
    if serves(element):
        release()


@compiled
def _column(element, fresh, c, c_row, a, a_row, b, b_row, n, rows):
    """64 columns; few rows take them at once, which reads b from one end to the other."""
    r = 0
    while rows - r >= 8:
        count = 12 if rows - r >= 12 else 8
        for j in range(0, 64, 32):
            cr, ar, bj = c + 4 * (r * c_row + j), a + 4 * r * a_row, b + 4 * j
            if count == 12:
                _tile(element, 12, 2, 16, fresh, cr, c_row, ar, a_row, bj, b_row, n)
            else:
                _tile(element, 8, 2, 16, fresh, cr, c_row, ar, a_row, bj, b_row, n)
        r += count
    if rows - r >= 4:
        cr, ar = c + 4 * r * c_row, a + 4 * r * a_row
        _tile(element, 4, 4, 16, fresh, cr, c_row, ar, a_row, b, b_row, n)
        r += 4
    cr, ar = c + 4 * r * c_row, a + 4 * r * a_row
    if rows - r == 3:
        _tile(element, 3, 4, 16, fresh, cr, c_row, ar, a_row, b, b_row, n)
    elif rows - r == 2:
        _tile(element, 2, 4, 16, fresh, cr, c_row, ar, a_row, b, b_row, n)
    elif rows - r == 1:
        _tile(element, 1, 4, 16, fresh, cr, c_row, ar, a_row, b, b_row, n)


@compiled
def product(element, fresh, c, c_row, a, a_row, b, b_row, n, rows, columns):
    """c += a b of any size, c = a b if `fresh`; addresses, and strides of rows in words.

    a is float32 where `takes_floats` says so. Between `begin` and `end`, of these rows.
    """
    if fits(element, n, columns):
        product_amx(fresh, c, c_row, a, a_row, b, b_row, n, rows, columns)
        return
    j = 0
    while j < columns:
        cj, bj = c + 4 * j, b + 4 * j
        if columns - j >= 64:
            _column(element, fresh, cj, c_row, a, a_row, bj, b_row, n, rows)
            j += 64
            continue
        for r in range(rows):
            cr, ar = cj + 4 * r * c_row, a + 4 * r * a_row
            if columns - j >= 16:
                _tile(element, 1, 1, 16, fresh, cr, c_row, ar, a_row, bj, b_row, n)
            else:
                _tile(element, 1, 1, 1, fresh, cr, c_row, ar, a_row, bj, b_row, n)
        j += 16 if columns - j >= 16 else 1
