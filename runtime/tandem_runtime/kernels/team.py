"""The threads of a CPU that compute each operator of a step together.

A kernel's work is in parts that do not depend on each other. One thread runs the model; for every
operator it puts the kernel on a board, from which all threads take part after part until none is
left. The others watch the board for the length of a step, in machine code, without Python's lock.
Who takes which part changes nothing in the result, and a thread that is kept from running holds up
the part that it has taken and no other.

Words of the board, each on a cache line of its own: a ticket (job | its parts | the next one to
take, 23, 20 and 20 bits, so that one atomic addition takes a part of the job that it names), parts
done, the kernel and its arguments, and whether the step is over.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import platform
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Final

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tandem_runtime.kernels.compiled import ELEMENTS, compiled

_DONE, _KERNEL, _ARGUMENTS, _OVER, _BYTES = 64, 128, 136, 192, 256
_COUNT_BITS: Final = 20
MOST_PARTS: Final = 1 << _COUNT_BITS - 1
PART_ROWS: Final = 8
"""Of operators that take some microseconds for so many."""
_SPINS: Final = 2000
"""Looks at the board, some 50 ns each, before others may have the processor in between."""
_LONG, _POINTER = ir.IntType(64), ir.PointerType()


# -- what the threads say to each other ------------------------------------------------------------
@intrinsic
def _load(typing_context, address):
    """A word; what was written before it was stored is seen after this."""

    def emit(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _LONG.as_pointer())
        return builder.load_atomic(place, "acquire", 8, typ=_LONG)

    return types.int64(types.int64), emit


@intrinsic
def _store(typing_context, address, value):
    """A word, after all that was written before."""

    def emit(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _LONG.as_pointer())
        builder.store_atomic(arguments[1], place, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def _add_one(typing_context, address):
    """To a word; returns what it was."""

    def emit(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _LONG.as_pointer())
        return builder.atomic_rmw("add", place, _LONG(1), "acq_rel")

    return types.int64(types.int64), emit


@intrinsic
def _pause(typing_context):
    """Tells the processor that this thread waits in a loop."""

    def emit(context, builder, signature, arguments):
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def _call(typing_context, kernel, arguments, part):
    """The kernel at an address. Its last parameter, an element whose value nobody looks at, is left
    out, so that kernels of all dtypes are called alike."""

    def emit(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [_LONG, _LONG])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


_yield = types.ExternalFunction("sched_yield", types.int32())


@compiled
def _wait_a_little(spins):
    _pause()
    if spins > _SPINS:
        _yield()


@compiled
def _take_parts(board):
    """Until the job has none left; returns the last ticket."""
    most = (1 << _COUNT_BITS) - 1
    while True:
        ticket = _add_one(board)
        part = ticket & most
        if part >= ticket >> _COUNT_BITS & most:
            return ticket
        _call(_load(board + _KERNEL), _load(board + _ARGUMENTS), part)
        _add_one(board + _DONE)


@compiled
def _share(board, kernel, arguments, parts):
    if board == 0 or parts == 1:
        for part in range(parts):
            _call(kernel, arguments, part)
        return
    _store(board + _KERNEL, kernel)
    _store(board + _ARGUMENTS, arguments)
    _store(board + _DONE, 0)
    job = (_load(board) >> 2 * _COUNT_BITS) + 1 & 0x7FFFFF
    _store(board, job << 2 * _COUNT_BITS | parts << _COUNT_BITS)
    _take_parts(board)
    spins = 0
    while _load(board + _DONE) < parts:
        spins += 1
        _wait_a_little(spins)


@compiled
def _serve(board):
    """Take parts until the step is over."""
    seen, spins = _load(board) >> 2 * _COUNT_BITS, 0
    if _load(board + _OVER) == 0:
        _take_parts(board)
    while _load(board + _OVER) == 0:
        if _load(board) >> 2 * _COUNT_BITS == seen:
            spins += 1
            _wait_a_little(spins)
        else:
            seen, spins = _take_parts(board) >> 2 * _COUNT_BITS, 0


# -- what Python sees ------------------------------------------------------------------------------
class Kernel:
    """One whose work is in parts: kernel(a, part, element), with the address of its
    arguments, int64 each. Compiled for a dtype at its first use."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self._made: Any = compiled(kernel)
        self._addresses: dict[torch.dtype, int] = {}

    def address(self, dtype: torch.dtype) -> int:
        found = self._addresses.get(dtype)
        if found is None:
            kinds = (types.CPointer(types.int64), types.int64, numba.typeof(ELEMENTS[dtype]))
            self._made.compile(kinds)
            made = self._made.overloads[kinds]
            name = made.fndesc.llvm_cfunc_wrapper_name
            found = self._addresses[dtype] = made.library.get_pointer_to_function(name)
        return found


_mine = threading.local()


def share(kernel: Kernel, dtype: torch.dtype, parts: int, *arguments: int) -> None:
    """Have all parts computed, by the team of this thread's step where it has one."""
    assert parts <= MOST_PARTS, f"{parts} parts, {MOST_PARTS} at most"
    values = array("q", arguments)
    address, _ = values.buffer_info()
    _share(getattr(_mine, "board", 0), kernel.address(dtype), address, parts)


def share_rows(kernel: Kernel, dtype: torch.dtype, rows: int, *arguments: int) -> None:
    """The same in parts of PART_ROWS rows; `rows` is the first argument."""
    share(kernel, dtype, -(-rows // PART_ROWS), rows, *arguments)


class Team:
    """`threads` that compute together; one of them is whoever enters `step`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._memory = np.zeros(_BYTES + 64, np.uint8)
        address = self._memory.ctypes.data
        self._board = address + -address % 64
        self._pool = ThreadPoolExecutor(max(1, threads - 1), "step")
        self._serving: list[Future[None]] = []
        self._end()
        _serve(self._board)  # compiled now

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, this thread's operators are everybody's."""
        if self.threads == 1:
            yield
            return
        wait(self._serving)
        self._words()[_OVER // 8] = 0
        self._serving = [self._pool.submit(_serve, self._board) for _ in range(self.threads - 1)]
        _mine.board = self._board
        try:
            yield
        finally:
            _mine.board = 0
            self._end()

    def _end(self) -> None:
        self._words()[_OVER // 8] = 1

    def _words(self) -> Any:
        offset = self._board - self._memory.ctypes.data
        return self._memory[offset : offset + _BYTES].view(np.int64)

    def close(self) -> None:
        self._pool.shutdown()
