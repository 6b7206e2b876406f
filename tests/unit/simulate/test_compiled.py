"""The benchmark's compiled simulator does what the readable one does, request by request."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from simulated_fleet import split_fleet, trace_of
from tandem.simulate.run import Setup, SimulationError
from tandem.simulate.scalers import Fixed, LawGroup, OperatorLaw, Scaler
from tandem.simulate.world import World
from tandem.traces.trace import Trace
from tandem_operator.plan.scaling.policy import Policy

from benchmarks.autoscaling.fast import simulate


def law() -> Scaler:
    policies = {
        "prefill": Policy("prefill", 1, 8, ttft_ms=1000.0, startup_s=20.0),
        "decode": Policy("decode", 1, 8, tpot_ms=25.0, startup_s=20.0),
    }
    return OperatorLaw([LawGroup(policies)])


def bursts(seed: int, *, shared: bool) -> Trace:
    """Five minutes with a burst in each, prompts of very different lengths."""
    rng = Random(seed)
    rows = [
        (
            60.0 * rng.randrange(5) + rng.expovariate(1 / 12.0) % 60.0,
            int(rng.lognormvariate(7.0, 1.2)) + 1,
            int(rng.lognormvariate(4.0, 1.5)) + 1,
        )
        for _ in range(1500)
    ]
    trace = trace_of(sorted(rows), 300.0)
    if not shared:
        return trace
    blocks = []
    for tokens in trace.prompt_tokens:
        family = rng.randrange(40)
        blocks.append(tuple(100 * family + i for i in range(min(tokens // 512, 60))))
    return Trace(**{**vars(trace), "blocks": blocks, "block_tokens": 512})


def same(setup: Setup, trace: Trace, scaler: type[Fixed] | None) -> World:
    """Plays both."""
    make = scaler or law
    world = World(setup, trace, make())
    slow, fast = world.run(), simulate(setup, trace, make())
    requests = slow.requests
    assert list(fast.fate) == [int(fate) for fate in requests.fate]
    assert list(fast.cached) == requests.cached
    np.testing.assert_allclose(fast.first_token_s, requests.first_token_s, atol=1e-9)
    np.testing.assert_allclose(fast.finished_s, requests.finished_s, atol=1e-9)
    assert fast.scale_events == slow.scale_events
    assert tuple(fast.replica_s[-1]) == pytest.approx(slow.replica_s)
    assert fast.ended_s == pytest.approx(slow.ended_s)
    return world


@pytest.mark.parametrize("shared", [False, True])
def test_both_simulators_agree_while_the_law_scales(shared: bool) -> None:
    world = same(split_fleet(2, 2), bursts(1, shared=shared), None)
    assert world._run.scale_events != (0, 0)
    assert (world._run.cached_tokens > 0) == shared


def test_both_simulators_agree_where_streams_give_way_and_requests_expire() -> None:
    world = same(split_fleet(1, 1, capacity_tokens=30_000), bursts(2, shared=False), Fixed)
    assert world._run.preemptions > 0
    fates = [int(fate) for fate in world._requests.fate]
    assert {1, 2} <= set(fates)


def test_a_fleet_that_the_compiled_one_cannot_play_is_refused() -> None:
    with pytest.raises(SimulationError, match="at most 64 streams"):
        simulate(split_fleet(1, 1, max_running=65), bursts(3, shared=False), Fixed())
    with pytest.raises(SimulationError, match="decode needs 65 replicas"):
        simulate(split_fleet(1, 65), bursts(3, shared=False), Fixed())
