"""The device's micro-benchmark where kernels run; on a GPU also against its data sheet."""

from __future__ import annotations

import time

import torch
from tandem_runtime.engine.probe import EVERY_S, DeviceProbe
from tandem_runtime.model.parallel import ALONE


def test_it_measures_this_device_without_waiting(device: torch.device) -> None:
    now_s = 0.0

    def clock() -> float:
        """Time goes on by hand between runs, and by itself while a CPU computes."""
        return now_s + time.perf_counter()

    probe = DeviceProbe(device, ALONE, clock)
    for _ in range(3):
        now_s += EVERY_S
        probe.run_if_due()
        if device.type == "cuda":
            torch.cuda.synchronize()
    assert probe.sums.runs == (2 if device.type == "cuda" else 3), "on a GPU each reads the last"
    assert probe.failing is None, "a healthy device"
    if device.type == "cuda":  # Whoever shares a CPU may be slow at start, and fast afterwards.
        copy = probe.sums.copied_bytes / probe.sums.copy_s
        matmul = probe.sums.flop / probe.sums.matmul_s
        assert 0.5 * probe.copy_bytes_per_s < copy < 1.2 * probe.copy_bytes_per_s
        assert 0.5 * probe.matmul_flop_per_s < matmul < 1.2 * probe.matmul_flop_per_s
