"""Failing nodes in simulated time: brakes hold, the floor holds, everything is replaced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_nodes import DEMAND, PACE, active, cluster
from tandem.cli import app
from tandem.simulate.nodes.failures import Failure, Hazard, Kind, draw_failures
from tandem.simulate.nodes.flow import Flow, Pace
from tandem.simulate.nodes.state import CONDITION
from tandem_operator.api.node_health import NodeHealthPolicySpec
from typer.testing import CliRunner

FAILURES = st.lists(
    st.builds(
        Failure,
        at_s=st.floats(0, 7200),
        kind=st.sampled_from(Kind),
        node=st.integers(0, 15),
        factor=st.floats(1.15, 2.0),
        warning_s=st.floats(1, 3600),
        repair_s=st.floats(400, 7200),
        silences_s=st.just(((0.0, 40.0), (100.0, 45.0), (200.0, 30.0))),
    ),
    max_size=6,
)


SILENCES = ((0.0, 40.0), (100.0, 45.0), (200.0, 30.0))
SPARES_ARE_SHORT = [
    Failure(0.0, Kind.FLAPS, 9, 1.15, 3600.0, 1000.0, SILENCES),
    Failure(0.0, Kind.FLAPS, 0, 1.15, 1.0, 1000.0, SILENCES),
    Failure(5632.0, Kind.STRAGGLES, 13, 1.5, 1000.0, 1000.0, SILENCES),
]
"""Pods that are deleted on nodes that only flap have to give those back."""


@settings(max_examples=40, deadline=None)
@example(failures=SPARES_ARE_SHORT, removes=True)
@given(FAILURES, st.booleans())
def test_whatever_fails(failures: list[Failure], removes: bool) -> None:
    policy = active() if removes else NodeHealthPolicySpec(mode="Off")
    world = cluster(16, failures=failures, policy=policy, pool_pods=7)
    # Two days: a straggler that nobody pulls out is found by a person after one.
    world.run(48 * 3600.0)
    counts = world.counts
    assert counts.over_the_brake == 0
    assert counts.under_the_floor == 0
    for pool in world.pools:
        # Everything that failed is replaced, and nothing is left over.
        assert len(pool.live) == len(pool.serving) == pool.size
        assert set(pool.serving.values()) == {1.0}
        assert 0.0 <= pool.flow.attained <= pool.flow.offered * (1 + 1e-9)
    assert not world.status.nodes or all(n.pods for n in world.status.nodes)


def death(kind: Kind = Kind.DEGRADES) -> Failure:
    return Failure(600.0, kind, 3, 1.5, 1200.0, 3600.0)


def test_a_node_that_warns_is_empty_when_it_dies() -> None:
    drained = cluster(16, failures=[death()], policy=active())
    drained.run(6000.0)
    left = cluster(16, failures=[death()], policy=NodeHealthPolicySpec(mode="Off"))
    left.run(6000.0)
    assert sum(p.flow.interrupted for p in drained.pools) == 0.0
    assert sum(p.under_s for p in drained.pools) == 0.0
    assert sum(p.flow.interrupted for p in left.pools) > 0.0
    # 300 s until Kubernetes evicts, after 40 s of silence; then the start of the replacement.
    assert sum(p.under_s for p in left.pools) == pytest.approx(440.0)


def test_a_straggler_is_pulled_out_once() -> None:
    world = cluster(16, failures=[death(Kind.STRAGGLES)], policy=active())
    world.run(3600.0)
    assert len(world.counts.found_after_s) == 1
    assert all(set(pool.serving.values()) == {1.0} for pool in world.pools)
    assert sum(pool.under_s for pool in world.pools) == 0.0


def test_failures_are_as_many_as_asked_for_and_the_same_for_a_seed() -> None:
    week_s = 7 * 86400.0
    drawn = draw_failures(Hazard(), 4096, week_s, seed=3)
    assert len(drawn) == pytest.approx(2016, rel=0.1)
    assert drawn == draw_failures(Hazard(), 4096, week_s, seed=3)
    assert drawn != draw_failures(Hazard(), 4096, week_s, seed=4)
    assert {failure.kind for failure in drawn} == set(Kind)


def test_requests_wait_as_a_fluid_does() -> None:
    largest = PACE.rate(PACE.most_streams)
    flow = Flow(Pace(PACE.spec, replace(DEMAND, requests_per_s=2 * largest)))
    flow.advance(10.0, {"a": 1.0})
    assert flow.backlog == pytest.approx(10 * largest)
    flow.advance(1000.0, {"a": 1.0})
    assert flow.backlog == pytest.approx(DEMAND.expiry_s * largest)
    early = flow.attained
    flow.advance(1010.0, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0})
    assert flow.backlog == pytest.approx((DEMAND.expiry_s - 20) * largest)
    assert flow.attained >= early
    flow.advance(1100.0, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0})
    assert flow.backlog == 0.0
    assert early < flow.attained < flow.offered


def test_the_command_writes_the_same_figures_for_a_seed(tmp_path: Path) -> None:
    def figures(name: str) -> str:
        file = tmp_path / name
        answer = CliRunner().invoke(
            app,
            ["simulate-nodes", "--nodes", "64", "--days", "0.2", "--failures-per-hour", "4",
             "--json", str(file)],
        )  # fmt: skip
        assert answer.exit_code == 0, answer.output
        assert "within both targets" in answer.output
        return file.read_text()

    assert figures("a") == figures("b")
    found = json.loads(figures("c"))
    assert [entry["policy"] for entry in found] == ["off", "drains", "drains and stragglers"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nodes", "1"], "give at least 2 nodes"),
        (["--spare-nodes", "4096"], "leave at least one for pods"),
        (["--load", "0"], "give a share above 0"),
        (["--failures-per-hour", "-1"], "give a number of at least 0"),
        (["--only", "all"], "give one of off, drains"),
        (["--gpus", "1"], "raise --gpus"),
    ],
)
def test_bad_input_is_a_sentence(options: list[str], sentence: str) -> None:
    answer = CliRunner().invoke(app, ["simulate-nodes", *options])
    assert answer.exit_code == 1
    assert sentence in answer.output


def test_a_condition_of_the_policy_is_one_that_nodes_show() -> None:
    world = cluster(16, failures=[], policy=active())
    world.run(600.0)
    ready = next(c for c in world.status.conditions if c.type == "Ready")
    assert ready.status == "True", (CONDITION, ready.message)
