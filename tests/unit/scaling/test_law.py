"""The law around an ideal pool: it follows load, holds, and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tandem_operator.plan.scaling.decision import ScaleReason
from tandem_operator.plan.scaling.fleet import decide_fleet
from tandem_operator.plan.scaling.forecast import _Group, _safe
from tandem_operator.plan.scaling.law import decide
from tandem_operator.plan.scaling.need import _spare
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState, Seen
from tandem_operator.plan.scaling.window import Load, PoolWindow, StepSums, step

Make = Callable[..., Any]
RATE = 47_700.0
"""Prompt tokens per second of a replica of the plant."""
NOBODY = Load(requests=0.0, prompt_tokens=0.0, output_tokens=0.0, streams=0.0)


def test_prefill_follows_prompt_tokens_and_decode_streams(plant: Make) -> None:
    prefill, decode = plant(), plant("decode")
    for _ in range(90):
        prefill.tick(prompt_tokens_s=5.0 * RATE)
        decode.tick(streams=68 * 4.0)
    # Five and four replicas' worth, each at 85 % at most. The backlog of the start-up asked for
    # more prefill replicas, of which the low band lets some stay.
    assert 6 <= prefill.size <= 8
    assert decode.size == 5


def test_more_streams_are_not_taken_for_longer_ones() -> None:
    """After a burst of streams, twice the load that runs now once asked for less than it alone."""
    steps = StepSums(20.0, 20.0, 0.0, 20.0, 0.0, 0.0, 20.0, 0.0, 20.0)
    burst = replace(NOBODY, streams=5351.0, steps=steps)
    quiet, last = replace(NOBODY, streams=1.0), replace(NOBODY, requests=1.0, max_streams=64.0)
    policy = Policy("decode", 1, 17)
    state, now_s = ScalingState(), 1e6
    for window_s, load in ((4.0, burst), (8.0, quiet)):
        now_s += window_s
        state = decide(policy, state, PoolWindow(window_s, 7, 7, load=load), now_s).state
    demands = [
        decide(
            policy,
            state,
            PoolWindow(
                10.0, 13, 13, load=replace(last, streams=3.0 * factor, queued_requests=factor)
            ),
            now_s + 10.0,
        ).numbers.demand
        for factor in (1.0, 2.0)
    ]
    assert demands[1] >= demands[0] > 0.0


def test_it_asks_at_once_and_not_twice_while_pods_start(plant: Make) -> None:
    pool = plant(forecast_percent=0)
    for _ in range(10):
        pool.tick(prompt_tokens_s=0.5 * RATE)
    assert pool.tick(prompt_tokens_s=3.0 * RATE).reason == ScaleReason.LOAD_OVER_BAND
    sizes = [pool.tick(prompt_tokens_s=3.0 * RATE).target for _ in range(9)]
    # The backlog of the start-up asks for a little more, the pods that start for none.
    assert sizes[0] >= 4
    assert sizes[-1] <= 7


def test_a_pod_that_never_starts_freezes_neither_way(plant: Make) -> None:
    pool = plant(startup_s=1e9, forecast_percent=0)
    for _ in range(10):
        pool.tick(prompt_tokens_s=0.5 * RATE)
    pool.tick(prompt_tokens_s=1.5 * RATE)
    stuck = pool.size
    assert stuck > 1
    for _ in range(40):
        pool.backlog = 0.0
        pool.tick(prompt_tokens_s=2.5 * RATE)
    assert pool.size > stuck
    for _ in range(60):
        pool.tick(prompt_tokens_s=0.2 * RATE)
    assert (pool.size, pool.ready) == (1, 1)


def test_it_shrinks_only_after_the_hold_time(plant: Make) -> None:
    pool = plant(ready=8)
    for _ in range(30):
        pool.tick(prompt_tokens_s=6.0 * RATE)
    full = pool.size
    reasons = []
    for _ in range(40):
        reasons.append(pool.tick(prompt_tokens_s=0.5 * RATE).reason)
        if pool.size < full:
            break
    # Two start-up times are 200 s, a window of the load 60 s.
    assert 20 <= len(reasons) <= 27
    assert reasons[-2:] == [ScaleReason.HELD, ScaleReason.LOAD_UNDER_BAND]
    for _ in range(60):
        pool.tick(prompt_tokens_s=0.5 * RATE)
    assert pool.size == 1


def test_no_traffic_is_load_zero_and_no_data_holds(plant: Make) -> None:
    pool = plant(ready=6)
    for _ in range(10):
        pool.tick(prompt_tokens_s=4.0 * RATE)
    size = pool.size
    blind = PoolWindow(10.0, size, pool.ready, load=None)
    for _ in range(100):
        pool.now_s += 10.0
        decision = decide(pool.policy, pool.state, blind, pool.now_s)
        pool.state = decision.state
        assert (decision.target, decision.reason) == (size, ScaleReason.NO_DATA)
    for _ in range(100):
        pool.tick()
    assert pool.size == 1


def test_zero_after_the_idle_time_and_back_at_the_first_request(plant: Make) -> None:
    pool = plant(min_replicas=0, idle_s=300.0)
    for _ in range(10):
        pool.tick(prompt_tokens_s=0.3 * RATE)
    ticks = 0
    while pool.size:
        pool.tick()
        ticks += 1
        assert ticks < 60
    assert ticks == 30
    assert pool.decisions[-1].reason == ScaleReason.IDLE
    assert pool.tick().target == 0
    decision = pool.tick(prompt_tokens_s=0.01 * RATE)
    assert (decision.target, decision.reason) == (1, ScaleReason.WAKE)


def test_without_an_idle_time_the_last_replica_stays(plant: Make) -> None:
    pool = plant(min_replicas=0, idle_s=None)
    for _ in range(500):
        pool.tick()
    assert pool.size == 1


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_a_pool_at_zero_wakes_before_anything_was_learned(role: Any) -> None:
    policy = Policy(role, 0, 4, idle_s=60.0)
    asked = replace(NOBODY, requests=1.0, prompt_tokens=10.0)
    for load, target, reason in (
        (NOBODY, 0, ScaleReason.NO_TRAFFIC),
        (asked, 1, ScaleReason.WAKE),
        (replace(NOBODY, queued_requests=1.0), 1, ScaleReason.WAKE),
    ):
        decision = decide(policy, ScalingState(), PoolWindow(10.0, 0, 0, load=load), 0.0)
        assert (decision.target, decision.reason) == (target, reason)


def test_a_size_out_of_bounds_is_brought_in_even_blind() -> None:
    policy = Policy("decode", 2, 4)
    for size, target in ((1, 2), (9, 4)):
        decision = decide(policy, ScalingState(), PoolWindow(10.0, size, size), 0.0)
        assert (decision.target, decision.reason) == (target, ScaleReason.OUT_OF_BOUNDS)


def test_latency_over_target_corrects_the_capacity(plant: Make) -> None:
    pool = plant("decode")
    for _ in range(20):
        pool.tick(streams=50.0)
    assert pool.size == 1
    # The same load, and a percentile that steps alone do not explain.
    for _ in range(12):
        pool.now_s += 10.0
        load = replace(pool._load(0.0, 50.0), tpot_ms=40.0)
        window = PoolWindow(10.0, pool.size, pool.ready, load=load)
        decision = decide(pool.policy, pool.state, window, pool.now_s)
        pool.state = decision.state
        if decision.target > 1:
            break
    assert (decision.target, decision.reason) == (2, ScaleReason.LATENCY_OVER_TARGET)


def test_latency_that_no_replica_helps_has_a_floor(plant: Make) -> None:
    pool = plant("decode")
    for _ in range(600):
        pool.now_s += 10.0
        load = replace(pool._load(0.0, 50.0), tpot_ms=4000.0)
        window = PoolWindow(10.0, pool.size, pool.size, load=load)
        decision = decide(pool.policy, pool.state, window, pool.now_s)
        pool.state = decision.state
        pool.ready = decision.target
    assert pool.size == 2


def test_growth_is_learned_from_load_that_rose_before(plant: Make) -> None:
    def late(forecast_percent: int) -> float:
        """Backlogs at the end of the later ramps, in replica seconds."""
        pool = plant(forecast_percent=forecast_percent, hold_s=100.0)
        left = []
        for _ in range(8):
            for tick in range(60):
                load = 2.0 if tick < 30 else 2.0 + 0.25 * (tick - 29) if tick < 50 else 7.0
                pool.tick(prompt_tokens_s=load * RATE)
                if tick == 49:
                    left.append(pool.backlog / RATE)
        return sum(left[4:])

    assert late(75) < 0.5 * late(0)


def test_streams_that_wait_are_not_standing_streams(plant: Make) -> None:
    """Six times the load, answers of two seconds: a queue grows until replicas serve, and asks for
    what drains it, not for a place for each stream in it."""
    pool, waiting, sizes = plant("decode"), 0.0, []
    for tick in range(60):
        # 60 streams arrive in a second at most 34 of which a replica ends.
        arrived = 10.0 * (10.0 if tick < 20 else 60.0)
        done = min(arrived + waiting, 340.0 * pool.ready)
        waiting += arrived - done
        streams = 68.0 * pool.ready if waiting else arrived * 0.2
        load = replace(
            pool._load(0.0, streams), requests=arrived, queued_requests=waiting, tpot_ms=25.0
        )
        pool.now_s += 10.0
        starting = tuple(pool.starting)
        new = [at for at in starting if at <= pool.now_s]
        pool.ready += len(new)
        pool.starting = [at for at in starting if at > pool.now_s]
        window = PoolWindow(10.0, pool.size, pool.ready, starting_s=(1.0,) * len(pool.starting),
                            startup_s=(100.0,) * len(new), load=load)  # fmt: skip
        decision = decide(pool.policy, pool.state, window, pool.now_s)
        pool.state = decision.state
        pool._resize(decision.target)
        sizes.append(decision.target)
    # Two replicas' worth; the queue peaks at 2,600 streams, or 38 replicas' worth of places.
    assert sizes[19] == 1
    assert 3 <= max(sizes) <= 5
    assert waiting == 0.0


def test_a_decode_pool_without_streams_shrinks(plant: Make) -> None:
    pool = plant("decode", ready=5)
    for _ in range(20):
        pool.tick(streams=68 * 4.0)
    for _ in range(100):
        pool.tick()
    assert pool.size == 1


def test_bursts_out_of_nothing_are_provided_for(plant: Make) -> None:
    def late(forecast_percent: int) -> float:
        """Backlogs in the later of bursts of a minute in each five, in replica seconds."""
        pool = plant(forecast_percent=forecast_percent, hold_s=100.0)
        left = []
        for _ in range(8):
            for tick in range(30):
                pool.tick(prompt_tokens_s=4.0 * RATE if tick < 6 else 0.02 * RATE)
                left.append(pool.backlog / RATE)
        return sum(left[120:])

    assert late(0) > 100.0
    assert late(90) == 0.0


def test_a_pool_that_is_new_keeps_its_size_until_something_followed(plant: Make) -> None:
    pool = plant(ready=8)
    sizes = [pool.tick(prompt_tokens_s=0.5 * RATE).target for _ in range(60)]
    # Moments are followed after a start-up of 100 s; eight of 12.5 s each must have been.
    assert sizes[:18] == [8] * 18
    assert sizes[-1] < 8


def test_the_less_is_known_the_more_is_added_to_a_burst() -> None:
    def size(kept: float, moments: float, burst: float) -> float:
        usual = Seen(5, 1.0, moments)
        return _safe(_Group(5, [usual, Seen(5, burst, 1.0)], kept), moments + 1.0)

    assert size(8.0, 10.0, 8.0) > size(8.0, 100.0, 8.0) > 8.0
    assert size(8.0, 10.0, 8.0) / 8.0 > size(2.0, 10.0, 2.0) / 2.0
    assert size(1.0, 10.0, 1.0) == 1.0


def test_a_load_that_rises_slowly_adds_replicas_in_few_steps(plant: Make) -> None:
    pool = plant(ready=8, forecast_percent=0)
    sizes = [pool.tick(prompt_tokens_s=(6.0 + 0.05 * i) * RATE).target for i in range(120)]
    steps = sum(a != b for a, b in pairwise(sizes))
    assert sizes[-1] - sizes[0] >= 5
    assert steps <= (sizes[-1] - sizes[0]) / 1.5


def test_a_first_token_that_waits_for_decode_takes_nothing_off_prefill() -> None:
    load = Load(100.0, 140_000.0, 0.0, 0.0, ttft_ms=9000.0, steps=step(2048, 0, 0.1).scaled(50.0))
    prefill = PoolWindow(10.0, 1, 1, load=load)
    streams = Load(0.0, 0.0, 0.0, 200.0, steps=step(0, 20, 0.02).scaled(500.0))
    policies = {
        "prefill": Policy("prefill", 1, 9, window_s=60.0),
        "decode": Policy("decode", 1, 9, tpot_ms=25.0),
    }

    def trim(serving: int) -> float:
        """Of prefill, after five minutes beside a decode pool of so many replicas."""
        states: dict[str, ScalingState] = {}
        for look in range(30):
            decode = PoolWindow(10.0, serving, serving, load=streams)
            seen = {"prefill": prefill, "decode": decode}
            decided = decide_fleet(policies, states, seen, None, 1e6 + 10.0 * look)
            states = {name: decision.state for name, decision in decided.items()}
        return states["prefill"].trim

    assert trim(serving=1) == 1.0
    assert trim(serving=30) < 1.0


def test_a_rare_burst_keeps_no_replicas(plant: Make) -> None:
    pool = plant()
    for tick in range(1500):
        pool.tick(prompt_tokens_s=4.0 * RATE if tick % 1000 in (10, 11) else 0.02 * RATE)
    assert pool.size == 1


def test_a_backlog_is_no_sign_of_a_wrong_capacity(plant: Make) -> None:
    pool = plant()
    for tick in range(60):
        pool.tick(prompt_tokens_s=(0.5 if tick < 20 else 3.0) * RATE)
    assert max(d.numbers.latency_ms or 0.0 for d in pool.decisions) > 5000.0
    assert pool.state.trim == 1.0


def test_long_prompts_get_replicas_to_wait_less_and_short_ones_none() -> None:
    assert _spare(6.0, own_s=0.3, slack_s=0.6) > 4.0 * _spare(6.0, own_s=0.03, slack_s=0.9)
    assert _spare(6.0, own_s=3.0, slack_s=0.1) == pytest.approx(2.33 * 5.0**0.5)
    assert _spare(1.0, own_s=3.0, slack_s=0.1) == 0.0
