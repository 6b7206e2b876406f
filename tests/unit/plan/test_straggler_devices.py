"""What a pod's micro-benchmark adds to its step times: it confirms a straggler, or delays one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_operator.plan.nodes.device import Probed, device_ratio, probed_since
from tandem_operator.plan.nodes.stragglers import UNCONFIRMED, Measured, Memory, observe, stragglers
from tandem_operator.plan.scaling.window import step
from tandem_runtime.device_report import ProbeSums

WINDOWS = 6
H100 = Probed(2.9e12, 6.5e14)


def probed(copy: float = 1.0, matmul: float = 1.0) -> Probed:
    return Probed(copy * H100.copy_bytes_per_s, matmul * H100.matmul_flop_per_s)


def pulled_out(slow: float, device: Probed | None, others: Probed | None = H100) -> list[str]:
    """What is said of the slow one of six pods, by window, while its device measures so."""
    chance = random.Random(1)
    memory: Memory = {}
    said = []
    for _ in range(3 * WINDOWS):
        seen = []
        for i in range(6):
            streams = chance.randint(5, 60)
            factor = (slow if i == 3 else 1.0) * chance.lognormvariate(0, 0.01)
            sums = step(0, streams, (0.012 + 1.5e-4 * streams) * factor).scaled(500.0)
            pod = Measured(f"u{i}", f"decode-{i}", f"node-{i}", "g", sums)
            seen.append(replace(pod, device=device if i == 3 else others))
        memory = observe(memory, seen, WINDOWS)
        found = stragglers(memory, {pod.uid: pod for pod in seen}, 10, WINDOWS)
        said.append(found[0].evidence if found else "")
    return said


def first(said: list[str]) -> int:
    """In which window."""
    return next(i for i, text in enumerate(said, 1) if text)


@pytest.mark.parametrize("device", [probed(copy=0.74), probed(matmul=0.8), probed(0.5, 0.5)])
def test_a_slow_device_confirms_it(device: Probed) -> None:
    said = pulled_out(1.27, device)
    assert first(said) == WINDOWS
    copy = device.copy_bytes_per_s / H100.copy_bytes_per_s
    matmul = device.matmul_flop_per_s / H100.matmul_flop_per_s
    told = f"x its peers for 6 windows, copy bandwidth {copy:.2f}x, matmul rate {matmul:.2f}x"
    assert said[WINDOWS - 1].startswith("decode-3 on node-3: 1.2")
    assert said[WINDOWS - 1].endswith(told)


def test_without_a_slow_device_it_takes_twice_as_long() -> None:
    said = pulled_out(1.27, probed(0.99))
    assert first(said) == UNCONFIRMED * WINDOWS
    assert "for 12 windows, copy bandwidth 0.99x, matmul rate 1.00x" in said[-1]


@pytest.mark.parametrize(("device", "others"), [(None, H100), (probed(0.99), None), (None, None)])
def test_what_is_not_measured_delays_nothing(device: Probed | None, others: Probed | None) -> None:
    said = pulled_out(1.27, device, others)
    assert first(said) == WINDOWS
    assert said[-1].endswith("x its peers for 6 windows")


def test_a_slow_device_alone_is_no_straggler() -> None:
    """Its steps take as long as the others': what is slow about it does not matter to them."""
    assert not any(pulled_out(1.0, probed(0.5)))


def test_a_chance_delay_is_forgiven() -> None:
    """Slow for longer than it takes to be found, by something else than its device."""
    chance = random.Random(2)
    memory: Memory = {}
    for at in range(4 * WINDOWS):
        seen = []
        for i in range(6):
            factor = 1.3 if i == 3 and at < WINDOWS + 3 else 1.0
            sums = step(0, chance.randint(5, 60), 0.02 * factor).scaled(500.0)
            seen.append(Measured(f"u{i}", f"decode-{i}", f"n{i}", "g", sums, 0.0, H100))
        memory = observe(memory, seen, WINDOWS)
        assert not stragglers(memory, {pod.uid: pod for pod in seen}, 10, WINDOWS), at


def test_rates_are_those_between_two_looks() -> None:
    past = ProbeSums(3, 300.0, 3.0, 30.0, 3.0)
    assert probed_since(ProbeSums(5, 500.0, 4.0, 70.0, 5.0), past) == Probed(200.0, 20.0)
    assert probed_since(past, past) is None, "it had no steps"
    assert probed_since(ProbeSums(1, 100.0, 1.0, 10.0, 1.0), past) is None, "it started anew"


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_whatever_a_pod_says_is_a_rate_or_nothing(numbers: list[float]) -> None:
    found = probed_since(ProbeSums(2, *numbers), ProbeSums())
    if found is not None:
        assert 0.0 < found.copy_bytes_per_s < float("inf")
        assert 0.0 < found.matmul_flop_per_s < float("inf")


def test_one_odd_window_moves_no_ratio() -> None:
    windows = {f"u{i}": [H100] * WINDOWS for i in range(4)}
    windows["u0"] = [probed(0.01), *[H100] * (WINDOWS - 1)]
    ratio = device_ratio(windows, "u0", 3)
    assert ratio is not None
    assert ratio.least == 1.0
    assert device_ratio(windows, "u9", 3) is None
    assert device_ratio({"u0": [H100], "u1": [H100]}, "u0", 3) is None
