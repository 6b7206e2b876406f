"""What this GPU can do at most: bytes read and copied, multiplications, each measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.gpu.timing import Clock

MATMUL_ROWS: Final = (1, 8, 32, 64, 128, 256, 512, 1024, 2048)
"""Where a product's time is measured; between them it is interpolated."""
MATMUL_BYTES: Final = 1 << 29
"""Of weights that one measurement goes through, so that none is in a cache."""


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one GPU."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    """Read and written bytes together."""
    matmul_flop_per_s: float
    """bfloat16 with float32 accumulation, at a size where nothing else limits."""

    @property
    def bytes_per_s(self) -> float:
        """What memory-bound work is compared with."""
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)


def measure_ceilings(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """A sum and a copy over 4 GiB, and a product of 8192-square matrices."""
    count, side = (1 << 12, 64) if clock.dry else (1 << 30, 8192)
    read_s, copy_s = _memory_s(clock, count)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    matmul_s = clock.kernel_s(lambda: a @ b)
    return Ceilings(4 * count / read_s, 8 * count / copy_s, 2 * side**3 / matmul_s)


def _memory_s(clock: Clock, count: int) -> tuple[float, float]:
    """Seconds to sum and to copy `count` float32."""
    data = torch.ones(count, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(data)
    return clock.kernel_s(lambda: data.sum()), clock.kernel_s(lambda: target.copy_(data))


@dataclass
class Matmuls:
    """Seconds of torch's own [rows, in] x [in, out], each measured when it is first asked for.

    Several weights are multiplied one after the other: neither a launch nor a cache is in the time.
    """

    clock: Clock
    dtype: torch.dtype
    measured: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def seconds(self, rows: int, n_in: int, n_out: int) -> float:
        """Of one product of any number of rows."""
        if rows >= MATMUL_ROWS[-1]:
            return rows / MATMUL_ROWS[-1] * self._at(MATMUL_ROWS[-1], n_in, n_out)
        above = next(i for i, count in enumerate(MATMUL_ROWS) if count >= rows)
        around = MATMUL_ROWS[max(above - 1, 0) : above + 1]
        if rows in around:
            return self._at(rows, n_in, n_out)
        return float(np.interp(rows, around, [self._at(count, n_in, n_out) for count in around]))

    def _at(self, rows: int, n_in: int, n_out: int) -> float:
        key = (rows, n_in, n_out)
        if key not in self.measured:
            count = 1 if self.clock.dry else max(2, MATMUL_BYTES // (2 * n_in * n_out))
            device, dtype = self.clock.device, self.dtype
            weights = torch.randn(count, n_out, n_in, device=device, dtype=dtype)
            x = torch.randn(rows, n_in, device=device, dtype=dtype)

            def run() -> None:
                for weight in weights:
                    linear(x, weight)

            self.measured[key] = self.clock.kernel_s(run, repeats=7) / count
        return self.measured[key]
