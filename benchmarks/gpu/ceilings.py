"""What this GPU can do at most: bytes read and copied, multiplications, each measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import Clock


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
