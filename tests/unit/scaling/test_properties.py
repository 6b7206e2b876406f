"""What holds for any load: bounds, steps, no oscillation, monotony, determinism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem_operator.plan.scaling.decision import Decision
from tandem_operator.plan.scaling.fleet import decide_fleet
from tandem_operator.plan.scaling.law import decide
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import NO_STEPS, Load, PoolWindow, step

ROLES = ("prefill", "decode", "both")
amounts = st.floats(0.0, 1e6, allow_nan=False)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    steps = NO_STEPS
    for _ in range(draw(st.integers(0, 3))):
        seconds = draw(st.floats(1e-4, 2.0))
        one = step(draw(st.integers(0, 8192)), draw(st.integers(0, 256)), seconds)
        steps += one.scaled(draw(st.floats(1.0, 1000.0)))
    percentile = st.one_of(st.none(), st.floats(0.1, 1e5))
    return Load(
        requests=draw(st.floats(0.0, 1e3)),
        prompt_tokens=draw(amounts),
        output_tokens=draw(amounts),
        streams=draw(st.floats(0.0, 1e4)),
        queued_requests=draw(st.floats(0.0, 1e3)),
        queued_tokens=draw(amounts),
        ttft_ms=draw(percentile),
        tpot_ms=draw(percentile),
        steps=steps,
        step_tokens=draw(st.sampled_from((0.0, 2048.0))),
        kv_tokens=draw(amounts),
        kv_capacity_tokens=draw(amounts),
        max_streams=draw(st.sampled_from((0.0, 64.0))),
    )


@st.composite
def windows(draw: st.DrawFn, size: int) -> PoolWindow:
    starting = draw(st.integers(0, size))
    return PoolWindow(
        window_s=draw(st.floats(0.5, 120.0)),
        size=size,
        ready=size - starting,
        starting_s=(5.0,) * starting,
        draining=draw(st.integers(0, 3)),
        startup_s=tuple(draw(st.lists(st.floats(0.1, 1e4), max_size=2))),
        load=draw(st.one_of(st.none(), loads())),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    low = draw(st.integers(0, 5))
    return Policy(
        draw(st.sampled_from(ROLES)),
        low,
        draw(st.integers(max(low, 1), 30)),
        out_step=draw(st.integers(1, 8)),
        out_step_percent=draw(st.sampled_from((0, 50, 100))),
        in_step=draw(st.integers(1, 3)),
        in_step_percent=draw(st.sampled_from((0, 25))),
        in_interval_s=draw(st.sampled_from((0.0, 60.0))),
        idle_s=draw(st.sampled_from((None, 60.0))) if low == 0 else None,
        hold_s=draw(st.sampled_from((None, 0.0, 30.0))),
        forecast_percent=draw(st.sampled_from((0, 75, 99))),
        gpus_per_replica=draw(st.integers(1, 4)),
    )


def within_steps(policy: Policy, size: int, decision: Decision) -> bool:
    """Between the bounds, and no further from the size than a step, but for the bounds."""
    target = decision.target
    low = 0 if policy.min_replicas == 0 else policy.floor
    if not low <= target <= policy.max_replicas:
        return False
    if target > size:
        return target <= max(size + policy.largest_out(size), policy.floor)
    smallest = min(size - policy.largest_in(size), policy.max_replicas)
    return target >= smallest or target == 0


@given(st.data(), policies())
@settings(max_examples=80, deadline=None)
def test_never_outside_bounds_and_steps(data: st.DataObject, policy: Policy) -> None:
    state, size, now_s = ScalingState(), data.draw(st.integers(0, 30)), 1e6
    for _ in range(8):
        window = data.draw(windows(size))
        now_s += window.window_s
        decision = decide(policy, state, window, now_s)
        assert within_steps(policy, size, decision)
        if decision.target == 0 < size:
            assert policy.idle_s is not None
        # Same inputs, same decision.
        assert decide(policy, state, window, now_s) == decision
        state, size = decision.state, decision.target


@given(st.data(), policies(), policies(), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_a_fleet_stays_within_its_budget(
    data: st.DataObject, first: Policy, second: Policy, budget_gpus: int
) -> None:
    pools = {"p": first, "d": second}
    states: dict[str, ScalingState] = {}
    sizes, now_s = {"p": 1, "d": 1}, 1e6
    for _ in range(6):
        seen = {name: data.draw(windows(size)) for name, size in sizes.items()}
        now_s += 10.0
        decisions = decide_fleet(pools, states, seen, budget_gpus, now_s)
        used = sum(p.gpus_per_replica * seen[n].size for n, p in pools.items())
        leaving = sum(p.gpus_per_replica * seen[n].draining for n, p in pools.items())
        grown = sum(
            p.gpus_per_replica * max(0, decisions[n].target - sizes[n]) for n, p in pools.items()
        )
        # What grows fits beside everything that still runs.
        assert not grown or used + leaving + grown <= budget_gpus
        for name, decision in decisions.items():
            # The budget keeps a pool that is under its bounds from growing into them.
            assert within_steps(pools[name], sizes[name], decision) or (
                sizes[name] <= decision.target < pools[name].floor
            )
        states = {name: decision.state for name, decision in decisions.items()}
        sizes = {name: decision.target for name, decision in decisions.items()}


@given(st.data(), policies(), loads(), st.floats(1.0, 5.0))
@settings(max_examples=100, deadline=None)
def test_more_load_never_means_fewer_replicas(
    data: st.DataObject, policy: Policy, load: Load, factor: float
) -> None:
    """After any history, a window with more of everything decides for no smaller size."""
    state, size, now_s = ScalingState(), data.draw(st.integers(1, 20)), 1e6
    for _ in range(4):
        window = data.draw(windows(size))
        now_s += window.window_s
        decision = decide(policy, state, window, now_s)
        state, size = decision.state, max(1, decision.target)
    more = replace(
        load,
        # Longer prompts, not more of them: their own time only shortens the slack.
        prompt_tokens=factor * load.prompt_tokens,
        streams=factor * load.streams,
        kv_tokens=factor * load.kv_tokens,
        queued_requests=factor * load.queued_requests,
        queued_tokens=factor * load.queued_tokens,
        ttft_ms=load.ttft_ms and factor * load.ttft_ms,
        tpot_ms=load.tpot_ms and factor * load.tpot_ms,
    )
    less_, more_ = (
        decide(policy, state, PoolWindow(10.0, size, size, load=one), now_s + 10.0)
        for one in (load, more)
    )
    assert more_.target >= less_.target


@given(
    role=st.sampled_from(ROLES),
    replicas=st.floats(0.0, 20.0),
    startup_s=st.sampled_from((5.0, 100.0, 300.0)),
    start=st.integers(1, 25),
)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_constant_load_means_no_oscillation(
    plant: Callable[..., Any], role: str, replicas: float, startup_s: float, start: int
) -> None:
    """From any size it settles: what it does after the first half hour is one direction at most."""
    pool = plant(role, startup_s, start)
    prompt = 47_700.0 * replicas if role != "decode" else 0.0
    streams = 68.0 * replicas if role != "prefill" else 0.0
    share = 0.5 if role == "both" else 1.0
    sizes = [pool.tick(share * prompt, share * streams).target for _ in range(360)]
    changes = [b - a for a, b in pairwise(sizes[180:]) if a != b]
    assert all(c > 0 for c in changes) or all(c < 0 for c in changes), sizes
    assert len(changes) <= 2
