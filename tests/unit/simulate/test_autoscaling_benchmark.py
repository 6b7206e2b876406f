"""The autoscaling benchmark's parts: resampling, rivals' rules, references, the loss."""

from __future__ import annotations

from random import Random

import pytest
from simulated_fleet import trace_of
from tandem.simulate.run import Setup
from tandem.traces.trace import Trace
from tandem_operator.plan.scaling.window import Load, PoolWindow

from benchmarks.autoscaling import reference
from benchmarks.autoscaling.claims import (
    LEVELS,
    Result,
    best_settings,
    hypervolume,
    ratio_by_seed,
    regret,
    upper_bound,
)
from benchmarks.autoscaling.reference import _prompt_needs, clairvoyant, static_peak
from benchmarks.autoscaling.resample import resample
from benchmarks.autoscaling.rivals import (
    Bounds,
    Hpa,
    IntervalForecast,
    PerPool,
    SloLaw,
    TokenVelocity,
    concurrency,
    prompt_work,
)
from benchmarks.autoscaling.setup import FLEETS, Score, ttft_target_s

KIND = FLEETS["8b"]


def window(
    size: int = 4, *, ready: int | None = None, seconds: float = 10.0, **load: float
) -> PoolWindow:
    asked = {"requests": 0, "prompt_tokens": 0, "output_tokens": 0, "streams": 0, **load}
    return PoolWindow(seconds, size, size if ready is None else ready, load=Load(**asked))


def made(count: int, seed: int = 0) -> Trace:
    rng = Random(seed)
    return trace_of([(rng.uniform(0, 900), 500 + i, 20 + i % 50) for i in range(count)], 900.0)


def test_a_resampled_trace_has_the_rate_and_lengths_of_its_origin() -> None:
    origin = made(600)
    larger = resample(origin, 5.0, seed=1)
    assert len(larger) == pytest.approx(3000, rel=0.1)
    assert larger.duration_s == 900
    assert all(0 <= at_s <= 900 for at_s in larger.arrival_s)
    assert list(larger.arrival_s) == sorted(larger.arrival_s)
    assert set(larger.prompt_tokens) <= set(origin.prompt_tokens)
    assert resample(origin, 5.0, 1) == larger
    assert resample(origin, 5.0, 2) != larger


def test_blocks_repeat_within_a_copy_only() -> None:
    origin = trace_of([(float(i), 1000, 5) for i in range(200)], 200.0)
    shared = Trace(**{**vars(origin), "blocks": [(7, 8)] * 200, "block_tokens": 512})
    larger = resample(shared, 3.0, seed=0)
    assert larger.blocks is not None
    assert len(set(larger.blocks)) == 3


def test_hpa_goes_up_by_ratio_and_down_to_the_largest_of_five_minutes() -> None:
    rule = Hpa(concurrency, per_replica=10.0)
    assert rule.target(window(4, streams=43.0), 0.0) == 4  # Within the tolerance.
    assert rule.target(window(4, streams=70.0), 15.0) == 7
    assert rule.target(window(4, streams=900.0), 30.0) == 8  # At most twice as many.
    assert rule.target(window(8, streams=10.0), 300.0) == 8
    assert rule.target(window(8, streams=10.0), 400.0) == 1
    assert rule.target(window(8, streams=10.0), 405.0) is None  # Between two syncs.


def test_the_slo_law_moves_by_bands() -> None:
    rule = SloLaw(lambda load: load.ttft_ms, 1000.0)
    assert rule.target(window(4, ttft_ms=450.0), 0.0) is None
    up = rule.target(window(4, ttft_ms=1500.0), 60.0)
    assert up == 8
    assert rule.target(window(8, ready=4, ttft_ms=1500.0), 75.0) is None
    calm = SloLaw(lambda load: load.ttft_ms, 1000.0)
    moves = [calm.target(window(4, ttft_ms=50.0), 15.0 * i) for i in range(22)]
    assert moves[:12] == [None] * 12
    assert [m for m in moves if m is not None] == [3, 3]


def test_the_forecast_decides_once_an_interval() -> None:
    rule = IntervalForecast(prompt_work, per_replica=1000.0, use=0.5)
    moves = [rule.target(window(prompt_tokens=20_000.0), 10.0 * i) for i in range(1, 37)]
    assert [i for i, move in enumerate(moves) if move is not None] == [17, 35]
    assert moves[17] == 4


def test_token_velocity_follows_at_once_and_leaves_late() -> None:
    rule = TokenVelocity(prompt_work, per_replica=1000.0, use=1.0)
    assert rule.target(window(prompt_tokens=35_000.0), 10.0) == 4
    assert rule.target(window(prompt_tokens=5_000.0), 60.0) == 4
    assert rule.target(window(prompt_tokens=5_000.0), 80.0) == 1


def test_bounds_hold_for_every_rival() -> None:
    scaler = PerPool(
        {"prefill": TokenVelocity(prompt_work, 1000.0, 1.0)}, {"prefill": Bounds(2, 6)}
    )
    assert scaler.decide({"prefill": window(prompt_tokens=9e9)}, 10.0)["prefill"].target == 6
    scaler = PerPool(
        {"prefill": TokenVelocity(prompt_work, 1000.0, 1.0)}, {"prefill": Bounds(2, 6)}
    )
    assert scaler.decide({"prefill": window()}, 10.0)["prefill"].target == 2


def test_a_burst_is_needed_in_all_windows_that_hold_it() -> None:
    needed = _prompt_needs([0.0, 0.0, 11.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert needed[2] == pytest.approx(1.0)
    assert needed[1] == needed[3] == pytest.approx(11 / 21)
    assert needed[8] == 0


def test_the_loss_counts_hours_and_missed_points() -> None:
    assert Score(0.995, 12.0, 0).loss(10.0) == pytest.approx(1.2)
    assert Score(0.97, 12.0, 0).loss(10.0) == pytest.approx(1.4)


def test_long_prompts_have_later_targets() -> None:
    assert ttft_target_s(KIND, 1000) == 1.0
    assert ttft_target_s(KIND, 60_000) > 3.0


def test_static_peak_is_the_least_that_keeps_99_percent() -> None:
    trace = trace_of([(i / 5, 8000, 60) for i in range(2000)], 400.0)
    peak = static_peak(KIND, trace, 1.0, 100.0, 4)
    assert peak.score.attained >= 0.99
    assert peak.replicas <= 6
    plan, work_hours = clairvoyant(KIND, peak, {"prefill": 6, "decode": 6}, 100.0)
    assert plan.attained >= 0.99
    assert plan.gpu_hours <= peak.score.gpu_hours * 1.05
    assert plan.gpu_hours > 0.5 * work_hours


def test_where_no_size_keeps_99_percent_the_static_peak_is_no_crowd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attained(sizes: dict[str, int], kind: object) -> Score:
        short = max(5 - sizes["prefill"], 0) + max(2 - sizes["decode"], 0)
        return Score(0.98 - 0.1 * short, float(sum(sizes.values())), 0.0)

    def sizes_of(setup: Setup, trace: Trace, scaler: object) -> dict[str, int]:
        sizes = {pool.name: pool.replicas for pool in setup.pools}
        return sizes if max(trace.output_tokens) > 1 else sizes | {"decode": 9}

    monkeypatch.setattr(reference, "play", sizes_of)
    monkeypatch.setattr(reference, "score", attained)
    peak = static_peak(KIND, made(10), 1.0, 100.0, 12)
    assert peak.sizes == {"prefill": 5, "decode": 2}
    assert peak.goal == pytest.approx(0.975)


def result(policy: str, setting: float, attained: float, hours: float, seed: int = 0) -> Result:
    found = Score(attained, hours, 0.0)
    return Result("t", seed, policy, setting, found, found.loss(10.0), hours / 10.0)


def test_the_setting_with_the_least_loss_counts() -> None:
    results = [result("a", 0.1, 0.99, 15.0), result("a", 0.2, 0.97, 11.0), result("b", 1, 1.0, 9.0)]
    assert best_settings(results) == {"a": 0.2, "b": 1}


def test_regret_compares_hours_at_equal_attainment() -> None:
    results = [result("a", 1, 0.999, 12.0), result("b", 1, 0.999, 10.0), result("b", 2, 0.93, 6.0)]
    low = sum(level <= 0.93 for level in LEVELS)
    expected = (2.0**low * 1.2 ** (len(LEVELS) - low)) ** (1 / len(LEVELS))
    assert regret(results, "a")["t"] == pytest.approx(expected)
    assert regret(results, "b")["t"] == pytest.approx(1.0)


def test_a_level_that_is_never_reached_saves_nothing() -> None:
    assert hypervolume([result("a", 1, 0.5, 1.0)], "a", 2.0) == 0
    assert hypervolume([result("a", 1, 0.999, 10.0)], "a", 2.0) == pytest.approx(0.5)


def test_a_claim_has_a_bound_over_seeds() -> None:
    results = [result("a", 1, 1.0, hours, seed) for seed, hours in enumerate((8.0, 9.0, 10.0))]
    results += [result("b", 1, 1.0, 10.0, seed) for seed in range(3)]
    ratios = ratio_by_seed(results, ("a", 1), ("b", 1))
    assert ratios == pytest.approx([0.8, 0.9, 1.0])
    assert 0.9 < upper_bound(ratios) < 1.2
    assert upper_bound(ratios[:1]) == float("inf")
