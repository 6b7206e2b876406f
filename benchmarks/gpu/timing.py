"""Times on a GPU: events around the work, a cold second-level cache, the median of several runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import torch

FLUSH_BYTES: Final = 256 << 20
"""More than any GPU's second-level cache."""


class OutOfTimeError(Exception):
    """The run's budget is used up; what was measured before stands."""


@dataclass
class Clock:
    """Measures on one device, and stops when the run's time is up.

    A dry run does the work once on the CPU, with small shapes, and its times mean nothing.
    """

    device: torch.device
    budget_s: float
    dry: bool
    _begun_s: float = field(default_factory=time.perf_counter)
    _flush: torch.Tensor | None = None

    def check(self) -> None:
        """Raises OutOfTimeError."""
        if time.perf_counter() - self._begun_s > self.budget_s:
            raise OutOfTimeError(f"{self.budget_s:.0f} s are over")

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return max(0.0, self.budget_s - (time.perf_counter() - self._begun_s))

    def kernel_s(self, run: Callable[[], object], repeats: int = 15) -> float:
        """Median seconds on the GPU of one call, each with a cold cache."""
        self.check()
        if self.dry:
            return self._once_s(run)
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        for _ in range(3):
            run()
        times = []
        for _ in range(repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return median(times)

    def _once_s(self, run: Callable[[], object]) -> float:
        begun_s = time.perf_counter()
        run()
        return time.perf_counter() - begun_s
