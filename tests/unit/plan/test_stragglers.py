"""One slow pod among its peers: found over many seeds, and nobody else. Simulated step times."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_operator.plan.nodes.stragglers import (
    Measured,
    Memory,
    observe,
    relative,
    stragglers,
    suspected,
)
from tandem_operator.plan.scaling.window import NO_STEPS, step

WINDOWS = 6
HOUR = 240
"""Windows of 15 s."""


@dataclass
class Pool:
    """Pods with a roofline, batches of their own that wander, contexts, and noise."""

    chance: random.Random
    size: int = 6
    slow: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.03
    """Standard deviation of a window's time, beside that of each step."""
    kv_s: float = 2e-8
    """For each token in the cache: a fifth of a step at 200k tokens."""

    def __post_init__(self) -> None:
        self.streams = [self.chance.uniform(5, 60) for _ in range(self.size)]
        self.context = [self.chance.uniform(500, 4000) for _ in range(self.size)]

    def window(self) -> list[Measured]:
        return [self._pod(i) for i in range(self.size)]

    def _pod(self, i: int) -> Measured:
        chance = self.chance
        self.streams[i] = min(120.0, max(2.0, self.streams[i] * chance.lognormvariate(0, 0.2)))
        self.context[i] = min(6e3, max(2e2, self.context[i] * chance.lognormvariate(0, 0.1)))
        kv = self.streams[i] * self.context[i]
        factor = self.slow.get(i, 1.0) * chance.lognormvariate(0, self.noise)
        sums = NO_STEPS
        for _ in range(10):
            streams = max(1, round(self.streams[i] * chance.uniform(0.7, 1.3)))
            prompt = chance.choice([0, 0, 0, 128, 512])
            seconds = 0.012 + 6e-5 * prompt + 1.5e-4 * streams + self.kv_s * kv
            sums += step(prompt, streams, seconds * factor * chance.lognormvariate(0, 0.05))
        return Measured(f"u{i}", f"decode-{i}", f"node-{i}", "g", sums.scaled(60.0), kv)


def found_after(pool: Pool, windows: int, percent: int = 10) -> tuple[int, str] | None:
    """In which window whom, if anybody."""
    memory: Memory = {}
    for at in range(windows):
        seen = pool.window()
        memory = observe(memory, seen, WINDOWS)
        found = stragglers(memory, {pod.uid: pod for pod in seen}, percent, WINDOWS)
        if found:
            return at + 1, found[0].evidence
    return None


def test_the_evidence_says_by_how_much_and_for_how_long() -> None:
    found = found_after(Pool(random.Random(1), slow={3: 1.25}, noise=0.0), 40)
    assert found is not None
    windows, evidence = found
    assert windows >= WINDOWS
    assert evidence.startswith("decode-3 on node-3: 1.2")
    assert evidence.endswith("x its peers for 6 windows")


@pytest.mark.parametrize(("factor", "least"), [(1.15, 0.8), (1.25, 1.0), (1.5, 1.0)])
def test_a_slow_pod_is_found_within_ten_minutes(factor: float, least: float) -> None:
    hits = []
    for seed in range(15):
        chance = random.Random(seed)
        which = chance.randrange(6)
        found = found_after(Pool(chance, slow={which: factor}), 40)
        hits.append(found is not None and found[1].startswith(f"decode-{which} "))
    assert sum(hits) / len(hits) >= least


def test_an_hour_of_mixed_load_has_no_false_alarm() -> None:
    for seed in range(2):
        assert found_after(Pool(random.Random(100 + seed)), HOUR) is None, seed


def test_all_of_them_is_load() -> None:
    for seed in range(4):
        slow = dict.fromkeys(range(6), 1.5)
        assert found_after(Pool(random.Random(seed), slow=slow), 60) is None


def test_of_many_slow_pods_no_healthy_one_is_taken() -> None:
    for seed in range(6):
        found = found_after(Pool(random.Random(seed), slow=dict.fromkeys(range(3), 1.5)), 60)
        assert found is None or found[1].startswith(("decode-0 ", "decode-1 ", "decode-2 "))


def test_the_roc_over_seeds() -> None:
    """Over thresholds: none below the one that finds nearly all raises false alarms often."""
    rates = {}
    for percent in (5, 10):
        hits = sum(
            found_after(Pool(random.Random(seed), slow={0: 1.25}), 30, percent) is not None
            for seed in range(8)
        )
        alarms = sum(
            found_after(Pool(random.Random(seed)), 40, percent) is not None for seed in range(8)
        )
        rates[percent] = (hits / 8, alarms / 8)
    assert rates[10] == (1.0, 0.0)
    assert rates[5][0] == 1.0
    assert rates[5][1] <= 0.2


def test_long_contexts_are_not_slowness() -> None:
    """One pod has four times the contexts of the others; a step then takes a third longer."""
    pool = Pool(random.Random(5), kv_s=8e-8)
    pool.context[2] = 6000.0
    assert found_after(pool, HOUR // 4) is None


def test_two_pods_have_no_median() -> None:
    assert found_after(Pool(random.Random(1), size=2, slow={0: 2.0}), 40) is None


def test_idle_pods_say_nothing() -> None:
    idle = Measured("u", "p", "n", "g", step(0, 1, 1.0))
    assert observe({}, [idle], WINDOWS) == {}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 20.0))
def test_a_faster_machine_changes_nothing(seed: int, speed: float) -> None:
    """Ratios are free of units: all times multiplied leave them as they are."""

    def ratios(factor: float) -> dict[str, tuple[float, ...]]:
        pool = Pool(random.Random(seed), size=4)
        pool.slow = dict.fromkeys(range(4), factor)
        seen: Memory = {}
        for _ in range(WINDOWS):
            seen = observe(seen, pool.window(), WINDOWS)
        return relative(seen["g"], WINDOWS)

    plain, scaled = ratios(1.0), ratios(speed)
    assert plain.keys() == scaled.keys()
    for uid, values in plain.items():
        assert scaled[uid] == pytest.approx(values, rel=0.02)


def test_a_pod_is_suspected_before_it_is_a_straggler() -> None:
    pool, memory = Pool(random.Random(2), slow={4: 1.5}, noise=0.01), {}
    before: list[dict[str, int]] = []
    for _ in range(40):
        seen = pool.window()
        memory = observe(memory, seen, WINDOWS)
        if stragglers(memory, {pod.uid: pod for pod in seen}, 10, WINDOWS):
            break
        before.append(suspected(memory, 10, WINDOWS))
    assert before[-1].keys() == {"u4"}
    assert 20 <= before[-1]["u4"] <= 70
    assert before[0] == {}


def test_nobody_is_suspected_when_all_are_slow() -> None:
    pool, memory = Pool(random.Random(2), slow=dict.fromkeys(range(6), 1.5)), {}
    for _ in range(30):
        memory = observe(memory, pool.window(), WINDOWS)
    assert suspected(memory, 20, WINDOWS) == {}
