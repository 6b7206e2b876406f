"""What a pod says of the health and the speed of its devices."""

from __future__ import annotations

import msgspec


class ProbeSums(msgspec.Struct, frozen=True):
    """Sums over the micro-benchmarks that a pod ran between its steps, all of the same size."""

    runs: int = 0
    copied_bytes: float = 0.0
    """Read and written, in the device's memory."""
    copy_s: float = 0.0
    flop: float = 0.0
    """Of matrix products."""
    matmul_s: float = 0.0


class DeviceReport(msgspec.Struct, frozen=True):
    """What a pod knows of its devices."""

    xids: dict[str, int] = {}
    """How often each of NVIDIA's error codes came since the pod started; not which came last."""
    failing: str | None = None
    """A sentence while a device fails: memory errors that cannot be corrected, clocks held down."""
    copy_bytes_per_s: float = 0.0
    """Of the self-test at start, of the slowest device; 0: there was none."""
    matmul_flop_per_s: float = 0.0
    probes: ProbeSums = ProbeSums()
