"""A micro-benchmark of the device that an engine runs on: how fast it copies and multiplies.

At start as a self-test, and once a second between two steps: a copy in its memory and a matrix
product, always of the same size, so that pods on the same kind of device can be compared whatever
their load is. On a GPU nobody waits for it: it is queued behind the step under way, timed by
events, and read at the next one. There it takes about 0.4 ms of each second and 224 MiB, on a CPU 1
to 3 ms and 17 MiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tandem_runtime.device_report import ProbeSums
from tandem_runtime.model.parallel import Ranks
from tandem_runtime.roofline.gpus import GPUS

EVERY_S: Final = 1.0
SELF_TEST_RUNS: Final = 8
LEAST_COPY: Final = 0.5
"""Of the memory bandwidth of the data sheet. A healthy device reaches 0.85; the weakest variant
that is sold under the same name (H100 PCIe beside SXM5) has 0.6 of it."""
LEAST_MATMUL: Final = 0.3
"""Of the dense bf16 FLOP/s of the data sheet. Healthy: 0.65, of the weakest variant 0.4."""
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Size:
    """How much one run does."""

    copy_bytes: int
    """Of one buffer; more than caches hold."""
    copies: int
    """From one buffer to another and back."""
    matmul_width: int
    dtype: torch.dtype


GPU: Final = Size(64 * _MIB, 4, 4096, torch.bfloat16)
CPU: Final = Size(8 * _MIB, 1, 256, torch.float32)


class DeviceProbe:
    """Implements `flight.Probe`; everything is called from the engine's thread.

    Args:
        device: where the engine computes.
        ranks: those that compute together; the self-test is that of the slowest of their devices,
            later runs are of this rank's alone.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        ranks: Ranks,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        on_gpu = device.type == "cuda"
        self.sums = ProbeSums()
        self._device = device
        self._clock = clock
        self._size = size = GPU if on_gpu else CPU
        self._buffers = [
            torch.zeros(size.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2)
        ]
        self._matrices = [
            torch.full((size.matmul_width,) * 2, 0.5, dtype=size.dtype, device=device)
            for _ in range(3)
        ]
        self._marks: list[torch.cuda.Event] | None = None
        """Of the run under way, on a GPU: before the copies, between, behind the product."""
        self._due_s = 0.0
        fastest_copy_s, fastest_matmul_s = self._self_test()
        self.copy_bytes_per_s = float(ranks.least(round(self._copied_bytes / fastest_copy_s)))
        self.matmul_flop_per_s = float(ranks.least(round(self._flop / fastest_matmul_s)))
        name = torch.cuda.get_device_name(device) if on_gpu else ""
        self.failing = weakness(name, self.copy_bytes_per_s, self.matmul_flop_per_s)

    @property
    def _copied_bytes(self) -> float:
        return 2.0 * self._size.copies * self._size.copy_bytes

    @property
    def _flop(self) -> float:
        return 2.0 * self._size.matmul_width**3

    def run_if_due(self) -> None:
        """See `flight.Probe`."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + EVERY_S
        if self._device.type != "cuda":
            self._add(*self._run_on_cpu())
            return
        if self._marks is not None and self._marks[-1].query():  # type: ignore[no-untyped-call]
            self._add(*_between(self._marks))
        self._marks = self._queue()

    def _self_test(self) -> tuple[float, float]:
        """Seconds of the fastest copy and product of several; the first brings libraries up."""
        runs = [self._run_to_its_end() for _ in range(SELF_TEST_RUNS)]
        return min(copy_s for copy_s, _ in runs), min(matmul_s for _, matmul_s in runs)

    def _run_to_its_end(self) -> tuple[float, float]:
        if self._device.type != "cuda":
            return self._run_on_cpu()
        marks = self._queue()
        marks[-1].synchronize()
        return _between(marks)

    def _run_on_cpu(self) -> tuple[float, float]:
        begun_s = self._clock()
        self._copy()
        copied_s = self._clock()
        self._multiply()
        return copied_s - begun_s, self._clock() - copied_s

    def _queue(self) -> list[torch.cuda.Event]:
        with torch.cuda.device(self._device):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
            marks[0].record()
            self._copy()
            marks[1].record()
            self._multiply()
            marks[2].record()
        return marks

    @torch.inference_mode()
    def _copy(self) -> None:
        for i in range(self._size.copies):
            self._buffers[(i + 1) % 2].copy_(self._buffers[i % 2])

    @torch.inference_mode()
    def _multiply(self) -> Tensor:
        one, other, product = self._matrices
        return torch.mm(one, other, out=product)

    def _add(self, copy_s: float, matmul_s: float) -> None:
        past = self.sums
        self.sums = ProbeSums(
            past.runs + 1,
            past.copied_bytes + self._copied_bytes,
            past.copy_s + copy_s,
            past.flop + self._flop,
            past.matmul_s + matmul_s,
        )


def _between(marks: list[torch.cuda.Event]) -> tuple[float, float]:
    """Seconds of the copies and of the product."""
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[1].elapsed_time(marks[2]) / 1e3


def weakness(name: str, copy_bytes_per_s: float, matmul_flop_per_s: float) -> str | None:
    """A sentence about a device that is far below its data sheet, by the driver's name for it.

    None where it is not, or where the catalogue does not know it: a part of a GPU (MIG), a CPU.
    """
    words = name.upper().split()
    gpu = next((gpu for gpu in GPUS.values() if gpu.name in words), None)
    if gpu is None or "MIG" in words:
        return None
    copy = copy_bytes_per_s / gpu.memory_bytes_per_s
    matmul = matmul_flop_per_s / gpu.bf16_flop_per_s
    if copy >= LEAST_COPY and matmul >= LEAST_MATMUL:
        return None
    return (
        f"in its self-test it copied at {copy:.2f}x and multiplied at {matmul:.2f}x the figures of "
        f"the {gpu.name}'s data sheet, and is to reach {LEAST_COPY:g}x and {LEAST_MATMUL:g}x"
    )
