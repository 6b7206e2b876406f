"""The device's micro-benchmark: what it counts, when it runs, and what a weak device is."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.engine.probe import CPU, SELF_TEST_RUNS, DeviceProbe, weakness
from tandem_runtime.model.parallel import ALONE
from tandem_runtime.roofline.gpus import GPUS


class Clock:
    """Each look takes as long as the test says."""

    def __init__(self) -> None:
        self.now_s, self.look_s = 100.0, 0.001

    def __call__(self) -> float:
        self.now_s += self.look_s
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def probe(clock: Clock) -> DeviceProbe:
    return DeviceProbe(torch.device("cpu"), ALONE, clock)


def test_the_self_test_gives_rates(probe: DeviceProbe) -> None:
    assert probe.copy_bytes_per_s == pytest.approx(
        2 * CPU.copy_bytes * CPU.copies / 0.001, rel=1e-6
    )
    assert probe.matmul_flop_per_s == pytest.approx(2 * CPU.matmul_width**3 / 0.001, rel=1e-6)
    assert probe.failing is None, "the catalogue has no CPUs"
    assert probe.sums.runs == 0, "what was measured at start is told apart"
    assert SELF_TEST_RUNS > 1


def test_it_runs_once_a_second_and_adds_up(probe: DeviceProbe, clock: Clock) -> None:
    for _ in range(3):
        probe.run_if_due()
    assert probe.sums.runs == 1
    clock.now_s += 1.0
    clock.look_s = 0.002
    probe.run_if_due()
    sums = probe.sums
    assert sums.runs == 2
    assert sums.copy_s == pytest.approx(0.003)
    assert sums.matmul_s == pytest.approx(0.003)
    assert sums.copied_bytes == 2 * 2 * CPU.copy_bytes * CPU.copies
    assert sums.flop == 2 * 2 * CPU.matmul_width**3


def test_it_computes_what_it_counts(probe: DeviceProbe) -> None:
    probe.run_if_due()
    product = probe._matrices[2]
    assert torch.equal(product, torch.full_like(product, 0.25 * CPU.matmul_width))


@pytest.mark.parametrize(
    ("name", "copy", "matmul", "weak"),
    [
        ("NVIDIA H100 80GB HBM3", 0.9, 0.65, False),
        ("NVIDIA H100 PCIe", 0.54, 0.4, False),
        ("NVIDIA H100 80GB HBM3", 0.4, 0.65, True),
        ("NVIDIA H100 80GB HBM3", 0.9, 0.2, True),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0.1, 0.1, False),
        ("NVIDIA GeForce RTX 4090", 0.1, 0.1, False),
        ("", 0.1, 0.1, False),
    ],
)
def test_a_weak_device_is_one_far_below_its_data_sheet(
    name: str, copy: float, matmul: float, weak: bool
) -> None:
    h100 = GPUS["H100"]
    found = weakness(name, copy * h100.memory_bytes_per_s, matmul * h100.bf16_flop_per_s)
    assert (found is not None) is weak
    if weak:
        assert found is not None
        assert f"copied at {copy:.2f}x and multiplied at {matmul:.2f}x" in found
