"""Whole runs: every request ends once, equal runs are equal, queues behave as theory says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_fleet import REPLICA, one_pool, split_fleet, trace_of
from tandem.simulate.report import course, output_token_s, summarise
from tandem.simulate.requests import Fate
from tandem.simulate.run import Run, Setup, SimulationError
from tandem.simulate.scalers import Choice, Fixed, LawGroup, OperatorLaw
from tandem.simulate.world import World
from tandem.traces.trace import Trace
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.window import PoolWindow


def law(setup: Setup, least: int = 1, most: int = 6) -> OperatorLaw:
    policies = {
        spec.name: Policy(
            spec.role, least, most, ttft_ms=1000, tpot_ms=25, startup_s=spec.startup_s
        )
        for spec in setup.pools
    }
    return OperatorLaw([LawGroup(policies)])


def poisson(rate: float, duration_s: float, prompt: int, output: int, seed: int = 1) -> Trace:
    rng, rows, at_s = Random(seed), [], 0.0
    while (at_s := at_s + rng.expovariate(rate)) < duration_s:
        rows.append((at_s, prompt, output))
    return trace_of(rows, duration_s)


def check_conserved(run: Run) -> None:
    requests = run.requests
    for request, fate in enumerate(requests.fate):
        assert fate is not Fate.OPEN
        if fate is Fate.FINISHED:
            assert requests.left[request] == 0
            begun_s = requests.arrival_s[request] + requests.first_token_s[request]
            assert requests.arrival_s[request] < begun_s <= requests.finished_s[request] + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 120), st.integers(1, 9000), st.integers(1, 400)), max_size=60
    ),
    prefill=st.integers(1, 3),
    decode=st.integers(1, 3),
    failures_s=st.sampled_from([None, 20.0, 100.0]),
    scaled=st.booleans(),
    tight=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_request_ends_once(
    rows: list[tuple[float, int, int]],
    prefill: int,
    decode: int,
    failures_s: float | None,
    scaled: bool,
    tight: bool,
    seed: int,
) -> None:
    setup = split_fleet(
        prefill,
        decode,
        failures_s=failures_s,
        seed=seed,
        capacity_tokens=12_000 if tight else None,
        max_running=4 if tight else 64,
    )
    run = World(setup, trace_of(rows), law(setup) if scaled else Fixed()).run()
    check_conserved(run)
    summary = summarise(run)
    assert summary.offered == len(rows)
    assert summary.finished + summary.expired + summary.refused == len(rows)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 60), st.integers(1, 9000), st.integers(1, 300)), max_size=60
    ),
    replicas=st.integers(1, 3),
)
def test_one_pool_for_both_ends_every_request_once(
    rows: list[tuple[float, int, int]], replicas: int
) -> None:
    check_conserved(World(one_pool(replicas), trace_of(rows), Fixed()).run())


def test_the_same_seed_gives_the_same_run() -> None:
    setup = split_fleet(failures_s=200.0, seed=7)
    trace = poisson(6.0, 300.0, 1500, 200)
    first, second = (World(setup, trace, law(setup)).run() for _ in range(2))
    assert summarise(first) == summarise(second)
    assert first.samples == second.samples
    assert first.failures > 0
    other = World(replace(setup, seed=8), trace, law(setup)).run()
    assert other.requests.finished_s != first.requests.finished_s


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_prompts_of_one_length_wait_as_in_m_d_1(busy: float) -> None:
    """A chunk takes exactly one prompt: one server, Poisson arrivals, constant service."""
    tokens = 1024
    service_s = REPLICA.prompt_s(tokens, 0, tokens)
    setup = split_fleet(chunk_tokens=tokens, expiry_s=math.inf)
    trace = poisson(busy / service_s, 60_000 * service_s, tokens, 1, seed=3)
    run = World(setup, trace, Fixed()).run()
    handoff_s = tokens * REPLICA.model.kv_token_bytes / setup.handoff_bytes_per_s
    waits = [first - service_s - handoff_s for first in run.requests.first_token_s]
    expected_s = busy * service_s / (2 * (1 - busy))
    assert min(waits) == pytest.approx(0, abs=1e-9)
    assert sum(waits) / len(waits) == pytest.approx(expected_s, rel=0.06)
    assert summarise(run).pools[0].busy_share == pytest.approx(busy, rel=0.02)


def test_streams_follow_littles_law() -> None:
    trace = poisson(4.0, 2000.0, 500, 200)
    run = World(split_fleet(), trace, Fixed()).run()
    steps = [tpot for i in range(len(trace)) if (tpot := output_token_s(run, i)) is not None]
    mean_s = sum(steps) / len(steps)
    streams = 4.0 * 199 * mean_s
    assert mean_s == pytest.approx(REPLICA.decode_s(streams, streams * 600), rel=0.05)


def test_no_traffic_is_a_run_of_idle_replicas() -> None:
    setup = split_fleet(2, 2)
    run = World(setup, trace_of([], 600.0), law(setup)).run()
    summary = summarise(run)
    assert summary.offered == 0
    assert summary.attained is None
    assert summary.ttft_s.p95 is None
    assert summary.gpu_hours == pytest.approx(4 * 600 / 3600, rel=0.02)
    assert [pool.busy_share for pool in summary.pools] == [0, 0]
    assert all(bucket.ttft_s is None for bucket in course(run))


def test_a_request_longer_than_the_cache_is_refused() -> None:
    setup = split_fleet(capacity_tokens=4000)
    run = World(setup, trace_of([(0.0, 3999, 2), (1.0, 3000, 200)]), Fixed()).run()
    assert run.requests.fate == [Fate.REFUSED, Fate.FINISHED]


def test_an_overload_is_given_up_in_time() -> None:
    setup = split_fleet(expiry_s=5.0)
    trace = poisson(60.0, 60.0, 4000, 10)
    run = World(setup, trace, Fixed()).run()
    summary = summarise(run)
    assert summary.expired > 0.5 * summary.offered
    assert summary.ttft_s.p99 is not None
    assert summary.ttft_s.p99 < 6.0
    assert summary.attained is not None
    assert summary.attained < 0.5


def test_the_law_adds_replicas_for_a_load_that_one_cannot_take() -> None:
    setup = split_fleet()
    trace = poisson(25.0, 900.0, 2500, 100)
    fixed = summarise(World(setup, trace, Fixed()).run())
    scaled = summarise(World(setup, trace, law(setup)).run())
    assert scaled.attained is not None
    assert fixed.attained is not None
    assert scaled.attained > fixed.attained + 0.3
    assert scaled.pools[0].max_replicas > 1
    assert scaled.gpu_hours > fixed.gpu_hours


def test_a_fleet_wakes_from_zero() -> None:
    setup = split_fleet(0, 0, startup_s=10.0)
    run = World(setup, trace_of([(100.0, 500, 20)], 200.0), law(setup, least=0)).run()
    assert run.requests.fate == [Fate.FINISHED]
    # Asked for at once, not at the next look; then the start-up.
    assert run.requests.first_token_s[0] == pytest.approx(10.0, abs=0.5)
    assert all(sample.sizes == (0, 0) for sample in run.samples if sample.at_s < 100)


def test_a_pool_that_nobody_starts_is_said() -> None:
    setup = split_fleet(1, 0, expiry_s=math.inf)
    with pytest.raises(SimulationError, match="1 streams wait for a decode replica, of which 0"):
        World(setup, trace_of([(0.0, 500, 20)]), Fixed()).run()


def test_the_first_token_waits_for_a_decode_replica_with_room() -> None:
    setup = split_fleet(max_running=1)
    run = World(setup, trace_of([(0.0, 500, 400), (0.0, 500, 400)]), Fixed()).run()
    first, second = run.requests.first_token_s
    assert second == pytest.approx(run.requests.finished_s[0], abs=1e-6)
    assert second > first + 2
    impatient = split_fleet(max_running=1, expiry_s=1.0)
    run = World(impatient, trace_of([(0.0, 500, 400), (0.0, 500, 400)]), Fixed()).run()
    assert run.requests.fate == [Fate.FINISHED, Fate.EXPIRED]


def test_a_lost_replica_costs_time_but_no_tokens() -> None:
    trace = poisson(3.0, 400.0, 1000, 300)
    calm = World(split_fleet(2, 2), trace, Fixed()).run()
    stormy = World(split_fleet(2, 2, failures_s=60.0, seed=2), trace, Fixed()).run()
    assert stormy.failures > 5
    assert sum(stormy.requests.moves) > 0
    check_conserved(stormy)
    assert summarise(stormy).output_tokens <= summarise(calm).output_tokens
    late, early = summarise(stormy).tpot_s.p99, summarise(calm).tpot_s.p99
    assert late is not None
    assert early is not None
    assert late > early


def test_prompts_that_begin_alike_are_computed_once() -> None:
    rows = [(5.0 * i, 5120, 10) for i in range(4)]
    plain = trace_of(rows)
    blocks = [tuple(range(10)), tuple(range(10)), (*range(5), *range(90, 95)), (70, 71)]
    shared = replace(plain, blocks=blocks, block_tokens=512)
    cold = World(split_fleet(), plain, Fixed()).run()
    warm = World(split_fleet(), shared, Fixed()).run()
    # All but one token, which has to be computed; a common beginning; nothing.
    assert warm.requests.cached == [0, 5119, 2560, 0]
    ratio = [w / c for w, c in zip(
        warm.requests.first_token_s, cold.requests.first_token_s, strict=True
    )]  # fmt: skip
    assert ratio[0] == pytest.approx(1)
    assert ratio[1] < 0.2
    assert ratio[2] < 0.7
    assert ratio[3] == pytest.approx(1)
    assert summarise(warm).cached_share == pytest.approx(7679 / 20480)


def test_gpu_hours_run_from_creation_to_deletion() -> None:
    setup = split_fleet(startup_s=50.0)

    class Script:
        """One more prefill replica at 100 s, gone again at 300 s."""

        def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
            target = 2 if 100 <= now_s < 300 else 1
            return {"prefill": Choice(target, "script")}

    run = World(setup, trace_of([], 600.0), Script()).run()
    assert run.replica_s[0] == pytest.approx(600 + 200)
    assert run.scale_events == (2, 0)
    assert [s.ready[0] for s in run.samples if 100 < s.at_s < 150] == [1] * 4
