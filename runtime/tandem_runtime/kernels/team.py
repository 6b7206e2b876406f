"""The threads of a CPU that compute each operator of a step together.

A kernel's work is in parts that do not depend on each other. One thread runs the model; for every
operator it puts the kernel on a board, from which all threads take part after part until none is
left. The others watch the board for the length of a step, in machine code, without Python's lock.
Who takes which part changes nothing in the result, and a thread that is kept from running holds up
the part that it has taken and no other.

A step whose operators are those of a step before can be replayed from a `Recording`: Python takes
longer over an operator than the operator over a few rows.

Words of the board, each on a cache line of its own: a ticket (job | its parts | the next one to
take, 23, 20 and 20 bits, so that one atomic addition takes a part of the job that it names), parts
done, the kernel and its arguments, and whether the step is over.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import platform
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
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
from torch import Tensor

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
def _replay(board, operators, count):
    for at in range(operators, operators + 24 * count, 24):
        _share(board, _load(at), _load(at + 8), _load(at + 16))


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
    recording: Recording | None = getattr(_mine, "recording", None)
    if recording is not None:
        recording.add(kernel.address(dtype), values, parts)
    _share(getattr(_mine, "board", 0), kernel.address(dtype), address, parts)


def share_rows(kernel: Kernel, dtype: torch.dtype, rows: int, *arguments: int) -> None:
    """The same in parts of PART_ROWS rows; `rows` is the first argument."""
    share(kernel, dtype, -(-rows // PART_ROWS), rows, *arguments)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """For what an operator computes; of the recording's memory where one is made."""
    recording: Recording | None = getattr(_mine, "recording", None)
    if recording is not None:
        return recording.empty(tuple(shape), dtype)
    return torch.empty(shape, dtype=dtype)


class Recording:
    """The operators of some rows, over memory that stays: `replay` computes them again, from
    whatever the tensors hold by then that they were recorded with."""

    def __init__(self) -> None:
        self._operators = array("q")
        """Three words of each: kernel, arguments, parts."""
        self._kept: list[array[int]] = []
        self._memory: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._half, self._taken = 0, 0

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Record what is computed inside. What a layer leaves is there until the layer after the
        next, which is like it and takes its memory."""
        self._half, self._taken = index % 2, 0
        _mine.recording = self
        try:
            yield
        finally:
            _mine.recording = None

    def add(self, kernel: int, arguments: array[int], parts: int) -> None:
        address, _ = arguments.buffer_info()
        self._operators.extend((kernel, address, parts))
        self._kept.append(arguments)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory, at = self._memory[self._half], self._taken
        if at == len(memory):
            memory.append(torch.empty(shape, dtype=dtype))
        found = memory[at]
        assert found.shape == shape and found.dtype == dtype, "layers are not alike"  # noqa: PT018
        self._taken += 1
        return found

    def replay(self) -> None:
        """Once more, by the team of this thread's step where it has one."""
        address, words = self._operators.buffer_info()
        _replay(getattr(_mine, "board", 0), address, words // 3)


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
