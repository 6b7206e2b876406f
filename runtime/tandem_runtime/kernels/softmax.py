"""Softmax of a row of attention scores on the CPU, sixteen at a time.

    w[t] = 2^((s[t] - max s) c), rounded to the dtype        returned: the sum of w before rounding

The compiler's own vectors are half as wide on some processors and twice as slow. Scores go to
lanes by their place, t mod 16, and are summed there in order: zeros that follow change nothing.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tandem_runtime.kernels.compiled import EXP2, FLOAT, WORD, fma_of

LANES: Final = 16
_FLOATS: Final = ir.VectorType(FLOAT, LANES)
_WORDS: Final = ir.VectorType(WORD, LANES)
_LONG: Final = ir.IntType(64)


def _all(kind, value):
    return ir.Constant(kind, [value] * LANES)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _exp2(builder, x):
    """compiled.py's, of each lane."""
    low, high = _all(_FLOATS, -126.0), _all(_FLOATS, 126.0)
    inside = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    inside = builder.select(builder.fcmp_ordered(">", inside, high), high, inside)
    k = builder.fptosi(builder.fadd(inside, _all(_FLOATS, 1024.5)), _WORDS)
    k = builder.sub(k, _all(_WORDS, 1024))
    r = builder.fsub(inside, builder.sitofp(k, _FLOATS))
    power = _all(_FLOATS, EXP2[0])
    for term in EXP2[1:]:
        power = builder.call(fma_of(builder, _FLOATS), [power, r, _all(_FLOATS, term)])
    scale = builder.shl(builder.add(k, _all(_WORDS, 127)), _all(_WORDS, 23))
    scaled = builder.fmul(power, builder.bitcast(scale, _FLOATS))
    return builder.select(builder.fcmp_ordered("<", x, low), _all(_FLOATS, 0.0), scaled)


def _narrow(builder, value, element):
    """compiled.py's, of each lane."""
    if element == types.uint16:
        bits = builder.bitcast(value, _WORDS)
        odd = builder.and_(builder.lshr(bits, _all(_WORDS, 16)), _all(_WORDS, 1))
        rounded = builder.add(bits, builder.add(odd, _all(_WORDS, 0x7FFF)))
        high = builder.lshr(rounded, _all(_WORDS, 16))
        return builder.trunc(high, ir.VectorType(ir.IntType(16), LANES))
    if element == types.int16:
        return builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
    return value


def _widen(builder, bits, element):
    """compiled.py's, of each lane."""
    if element == types.uint16:
        shifted = builder.shl(builder.zext(bits, _WORDS), _all(_WORDS, 16))
        return builder.bitcast(shifted, _FLOATS)
    return builder.fpext(bits, _FLOATS) if element == types.int16 else bits


@intrinsic
def softmax(typing_context, element, scores, weights, width, factor, wide):
    """Of `width` scores, a multiple of 16; hidden ones are minus infinity. Addresses.

    `wide`: rounded weights are stored as float32, which may be where the scores are.
    """

    def emit(context, builder, signature, arguments):
        _, scores, weights, width, factor, wide = arguments
        item = 4 if element == types.float32 else 2

        def at(base, place, size_bytes):
            offset = builder.mul(place, _LONG(size_bytes))
            return builder.inttoptr(builder.add(base, offset), ir.PointerType())

        def each(kept):
            """Of every vector: its place, its scores, and what was kept before it."""
            with cgutils.for_range_slice(builder, _LONG(0), width, _LONG(LANES)) as (place, _):
                score = builder.load(at(scores, place, 4), typ=_FLOATS, align=4)
                yield place, score, builder.load(kept, typ=_FLOATS)

        tops = cgutils.alloca_once_value(builder, _all(_FLOATS, float("-inf")))
        for _, score, before in each(tops):
            builder.store(_larger(builder, score, before), tops)
        lanes = builder.load(tops, typ=_FLOATS)
        top = builder.extract_element(lanes, WORD(0))
        for lane in range(1, LANES):
            top = _larger(builder, builder.extract_element(lanes, WORD(lane)), top)
        top, factor = (_spread(builder, value) for value in (top, factor))
        totals = cgutils.alloca_once_value(builder, _all(_FLOATS, 0.0))
        for place, score, before in each(totals):
            weight = _exp2(builder, builder.fmul(builder.fsub(score, top), factor))
            builder.store(builder.fadd(before, weight), totals)
            rounded = _narrow(builder, weight, element)
            with builder.if_else(wide) as (as_floats, as_elements):
                with as_floats:
                    exact = _widen(builder, rounded, element)
                    builder.store(exact, at(weights, place, 4), align=4)
                with as_elements:
                    builder.store(rounded, at(weights, place, item), align=item)
        lanes = builder.load(totals, typ=_FLOATS)
        total = builder.extract_element(lanes, WORD(0))
        for lane in range(1, LANES):
            total = builder.fadd(total, builder.extract_element(lanes, WORD(lane)))
        return total

    kinds = (element, types.int64, types.int64, types.int64, types.float32, types.boolean)
    return types.float32(*kinds), emit


def _spread(builder, value):
    """A float32 in all lanes."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, WORD(0))
    return builder.shuffle_vector(first, nothing, _all(_WORDS, 0))
