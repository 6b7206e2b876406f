"""What the CPU's kernels are compiled with: Numba, from Python, without a C compiler.

Kernels take addresses, and first an *element*: a number whose type says which dtype lies there.
Numba knows no bfloat16 and no float16 on a CPU, so their bits travel as uint16 and int16; `widen`
and `narrow` convert. fp8 is bytes that are moved and looked up. Nothing here contracts or reorders
arithmetic: where a product and a sum are to be rounded once, `fma` says so, and how wide a
processor's vectors are changes no bit.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

ELEMENTS: Final[dict[torch.dtype, np.generic]] = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float8_e4m3fn: np.uint8(0),
}
FLOAT: Final = ir.FloatType()
WORD: Final = ir.IntType(32)


def element_of(x: Tensor) -> np.generic:
    """What a kernel is told of x's dtype."""
    return ELEMENTS[x.dtype]


def words_of(dtype: torch.dtype) -> int:
    """Elements that share a word of 32 bits."""
    return 4 // dtype.itemsize


def features() -> frozenset[str]:
    """Of the processor that kernels are compiled for, as LLVM names its instructions."""
    if numba.config.CPU_FEATURES is not None:  # NUMBA_CPU_FEATURES
        return frozenset(numba.config.CPU_FEATURES.replace("+", "").split(","))
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def _may_use_amx() -> bool:
    """Linux gives the matrix unit's registers, 8 KiB a thread, to a process that asks for them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)


SLOW_PAIRS: Final = ("sapphirerapids", "emeraldrapids")
"""LLVM's names of processors that take four times as long for `vdpbf16ps` as for an `fma` of
vectors, of which two do the same."""


def _has_pairs() -> bool:
    name = numba.config.CPU_NAME or binding.get_host_cpu_name()  # NUMBA_CPU_NAME
    return "avx512bf16" in features() and name not in SLOW_PAIRS


HAS_PERMUTE: Final = "avx512bw" in features()
HAS_PAIRS: Final = _has_pairs()
HAS_AMX: Final = {"amx-tile", "amx-bf16", "avx512bf16"} <= features() and _may_use_amx()


def _cache_folder() -> str:
    """Machine code is kept for these sources alone: Numba itself looks at one file of a kernel, and
    at the processor, but not at what the system lets a process use."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts = [path.read_bytes() for path in sources]
    digest = hashlib.blake2b(b"".join([*parts, b"amx" if HAS_AMX else b""]), digest_size=8)
    return str(Path(os.environ.get("NUMBA_CACHE_DIR") or _own_folder()) / digest.hexdigest())


def _own_folder() -> Path:
    folder = Path.home() / ".cache" / "tandem" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="tandem-kernels-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp())


numba.config.CACHE_DIR = _cache_folder()


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as machine code, made at its first call, and kept; it runs without the GIL."""
    made: Callable[..., Any] = numba.njit(nogil=True, cache=True, error_model="numpy")(kernel)
    return made


@intrinsic
def pointer(typing_context, address, element):
    """To elements, from an int64 address."""
    kind = types.CPointer(element)

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, element), emit


LINE_BYTES: Final = 64
"""Of the processor's cache; the matrix unit is four times as slow where rows lie across two."""


@compiled
def line_in(memory):
    """Address of the first whole line of a uint8 array that has LINE_BYTES to spare."""
    return memory.ctypes.data + (LINE_BYTES - 1) & -LINE_BYTES


def fetch(builder: ir.IRBuilder, place: ir.Value, cache: int) -> None:
    """Begin to bring a line into the processor's first or second cache."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), WORD, WORD, WORD])
    found = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(found, [place, WORD(0), WORD(4 - cache), WORD(1)])


@intrinsic
def _fetch(typing_context, address):
    """A line into the second cache."""

    def emit(context, builder, signature, arguments):
        fetch(builder, builder.inttoptr(arguments[0], ir.PointerType()), 2)
        return context.get_dummy_value()

    return types.void(types.int64), emit


@compiled
def prefetch(address, size_bytes):
    """Begin to bring so many bytes into the processor's cache; nothing waits for them."""
    for at in range(address, address + size_bytes, LINE_BYTES):
        _fetch(at)


@intrinsic
def keep(typing_context, memory):
    """Numba lets go of an array after its last use, and sees none where an address is used."""

    def emit(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(memory), emit


@intrinsic
def widen(typing_context, element):
    """An element's value as a float32."""

    def emit(context, builder, signature, arguments):
        (bits,) = arguments
        if element == types.uint16:
            shifted = builder.shl(builder.zext(bits, WORD), WORD(16))
            return builder.bitcast(shifted, FLOAT)
        if element == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), FLOAT)
        return bits

    return types.float32(element), emit


@intrinsic
def narrow(typing_context, value, element):
    """A float32 rounded to the nearest element, ties to even."""

    def emit(context, builder, signature, arguments):
        if element == types.uint16:
            bits = builder.bitcast(arguments[0], WORD)
            odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
            rounded = builder.add(bits, builder.add(odd, WORD(0x7FFF)))
            return builder.trunc(builder.lshr(rounded, WORD(16)), ir.IntType(16))
        if element == types.int16:
            return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
        return arguments[0]

    return element(types.float32, element), emit


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once."""

    def emit(context, builder, signature, arguments):
        return builder.call(fma_of(builder, FLOAT), arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


def fma_of(builder: ir.IRBuilder, kind: ir.Type) -> ir.Function:
    """LLVM's fma of float32, or of a vector of them."""
    lanes = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    signature = ir.FunctionType(kind, [kind] * 3)
    return cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.{lanes}f32")


@intrinsic
def _from_bits(typing_context, bits):
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), emit


@intrinsic
def as_float(typing_context, bits):
    """A float32 that `float_bits` made an int64."""

    def emit(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], WORD), FLOAT)

    return types.float32(types.int64), emit


@cache
def float_bits(value: float) -> int:
    """A float32 as an integer, to travel among addresses."""
    return int(np.float32(value).view(np.int32))


EXP2: Final = (
    1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0,
)  # fmt: skip
"""Of 2^r's Taylor series, from r^6 to r^0."""


@compiled
def exp2(x):
    """2^x of a float32, in which loops over it become vectors: 0 below 2^-126, at most 2^126.

    x = k + r with k an integer and |r| <= 1/2; 2^r by its Taylor series, 2^k by its bits.
    """
    inside = np.float32(-126) if x < np.float32(-126) else x
    inside = np.float32(126) if inside > np.float32(126) else inside
    k = np.int32(inside + np.float32(1024.5)) - np.int32(1024)
    r = inside - np.float32(k)
    power = np.float32(EXP2[0])
    for term in EXP2[1:]:
        power = fma(power, r, np.float32(term))
    scaled = power * _from_bits(np.int32((k + np.int32(127)) << np.int32(23)))
    return np.float32(0) if x < np.float32(-126) else scaled
