"""When nothing is done: brakes, pauses, dry runs; and what people did is theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from node_cluster import CONDITIONS, Cluster, steps
from tandem_operator.api.node_health import NodeHealthPolicySpec
from tandem_operator.plan.actions import PatchNode
from tandem_operator.plan.nodes.brakes import allowed
from tandem_operator.plan.nodes.repair import repair_of


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (10, 2), (100, 20)]
)
def test_at_most_one_node_or_a_fifth(size: int, expected: int) -> None:
    spec = NodeHealthPolicySpec()
    assert allowed(spec.brakes, size) == expected
    cluster = Cluster(size)
    failing = [f"n{i}" for i in range(0, size // 2)] or []
    cluster.silence(*failing)
    cluster.look()
    for _ in range(5):
        cluster.look(61)
        assert cluster.in_repair <= set(failing)
        assert len(cluster.in_repair) == min(expected, len(failing))
    held = set(failing) - cluster.in_repair
    assert {cluster.phase(name) for name in held} <= {"Held"}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10])
def test_all_silent_is_an_outage(size: int) -> None:
    cluster = Cluster(size)
    cluster.silence(*cluster.nodes)
    for _ in range(20):
        assert not steps(cluster.look(60))
    assert cluster.in_repair == set()
    reason, message = cluster.says("Held")
    assert reason == "Outage"
    assert f"{size} of {size} nodes show NotReady" in message


def test_after_an_outage_stragglers_get_a_while_to_return() -> None:
    cluster = Cluster(4)
    cluster.silence(*cluster.nodes)
    cluster.look()
    cluster.look(300)
    cluster.recover("n0", "n1", "n2")
    for _ in range(11):
        cluster.look(10)
        assert cluster.in_repair == set()
    cluster.look(20)
    assert cluster.in_repair == {"n3"}, "it did not return"
    assert cluster.status.outage_since is None


def test_a_detector_that_condemns_most_nodes_is_not_believed() -> None:
    cluster = Cluster(10, spec=CONDITIONS)
    for i in range(6):
        cluster.condition(f"n{i}", "KernelDeadlock", "True")
    cluster.look()
    cluster.look(600)
    assert cluster.in_repair == set()
    cluster.condition("n5", "KernelDeadlock", "False")
    cluster.look(1)
    cluster.look(121)
    assert len(cluster.in_repair) == 2, "half of them may be"


def test_an_outage_stops_what_was_begun_from_going_further_but_not_from_being_undone() -> None:
    cluster = Cluster(10, spec={"drain": {"evictAfterSeconds": 0}})
    cluster.silence("n0")
    cluster.look()
    cluster.look(60)
    cluster.silence(*(f"n{i}" for i in range(1, 10)))
    for _ in range(3):
        assert not steps(cluster.look(10))
    cluster.recover(*cluster.nodes)
    cluster.look(1)
    cluster.look(121)
    assert cluster.in_repair == set()


def test_a_node_that_somebody_drains_takes_its_place_among_those_in_repair() -> None:
    cluster = Cluster(4)
    cluster.cordon("n0")
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    assert cluster.phase("n1") == "Held"
    del cluster.pods["p0"]
    cluster.look(1)
    assert cluster.in_repair == {"n1"}, "it carries nothing any more"


def test_a_node_without_pods_of_tandem_is_none_of_our_business() -> None:
    cluster = Cluster(4)
    del cluster.pods["p1"]
    cluster.silence("n1")
    cluster.look()
    cluster.look(600)
    assert cluster.phase("n1") == "Held"
    assert "carries no pods of Tandem" in cluster.expect("n1").message


def test_the_longest_failing_goes_first_and_the_silent_before_all() -> None:
    cluster = Cluster(5, spec=CONDITIONS)
    cluster.condition("n0", "KernelDeadlock", "True")
    cluster.look()
    cluster.silence("n3")
    cluster.look(1)
    cluster.annotations = {"tandem.dev/repair-paused": "true"}
    cluster.look(100)
    cluster.annotations = {}
    cluster.look(1)
    assert cluster.in_repair == {"n3"}


def test_a_dry_run_says_and_does_nothing() -> None:
    cluster = Cluster(10, spec={"mode": "DryRun"})
    cluster.silence("n0", "n1", "n2")
    cluster.look()
    assert not steps(cluster.look(60))
    phases = [cluster.phase(f"n{i}") for i in range(3)]
    assert phases == ["DryRun", "DryRun", "Held"], "under the same brakes"
    assert not steps(cluster.look(10_000))
    spec = NodeHealthPolicySpec(mode="DryRun")
    assert repair_of(spec, cluster.status).nodes == frozenset()
    assert ("NodeDryRun", "n0 DryRun: Ready is Unknown; it would be drained") in cluster.notes


def test_off_and_deleted_policies_undo_what_was_begun() -> None:
    for change in ({"mode": "Off"}, {"mode": "DryRun"}, None):
        cluster = Cluster()
        cluster.silence("n1")
        cluster.look()
        cluster.look(60)
        cluster.look(1)
        assert cluster.cordoned == {"n1"}
        cluster.spec, cluster.policy_gone = change or {}, change is None
        cluster.look(1)
        assert cluster.cordoned == set()
        assert all(not n.annotations for n in cluster.nodes.values())


@pytest.mark.parametrize("where", ["policy", "node"])
def test_a_pause_holds_and_resumes(where: str) -> None:
    cluster = Cluster(spec={"drain": {"evictAfterSeconds": 0}})
    pause = {"tandem.dev/repair-paused": "true"}
    cluster.silence("n1")
    cluster.look()
    if where == "policy":
        cluster.annotations = pause
    else:
        cluster.nodes["n1"] = replace(cluster.nodes["n1"], annotations=pause)
    for _ in range(3):
        assert not steps(cluster.look(60))
    assert cluster.phase("n1") == "Held"
    cluster.annotations = {}
    cluster.nodes["n1"] = replace(cluster.nodes["n1"], annotations={})
    cluster.look(1)
    assert cluster.in_repair == {"n1"}


def test_our_own_cordon_is_taken_back_and_nobody_elses() -> None:
    cluster = Cluster(10)
    cluster.cordon("n1")
    cluster.silence("n0", "n1")
    cluster.look()
    cluster.look(60)
    cluster.look(1)
    assert cluster.cordoned == {"n0", "n1"}
    assert cluster.nodes["n0"].cordoned_by_us
    assert not cluster.nodes["n1"].annotations
    cluster.recover("n0", "n1")
    cluster.look(1)
    cluster.look(121)
    assert cluster.cordoned == {"n1"}
    assert not cluster.nodes["n0"].annotations


def test_a_person_who_uncordons_is_right() -> None:
    cluster = Cluster()
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    cluster.look(1)
    cluster.cordon("n1", on=False)
    cluster.look(1)
    assert cluster.phase("n1") == "Released"
    for _ in range(5):
        cluster.look(100)
    assert cluster.cordoned == set()
    assert not cluster.nodes["n1"].annotations
    cluster.recover("n1")
    cluster.look(1)
    cluster.look(121)
    cluster.silence("n1")
    cluster.look(1)
    cluster.look(60)
    assert cluster.in_repair == {"n1"}, "a new failure is a new one"


def test_a_cordon_after_the_repair_stays() -> None:
    cluster = Cluster()
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    cluster.look(1)
    cluster.recover("n1")
    cluster.look(1)
    cluster.look(121)
    cluster.cordon("n1")
    for _ in range(3):
        cluster.look(200)
    assert cluster.cordoned == {"n1"}


def test_without_the_right_to_write_pods_are_moved_and_nodes_left() -> None:
    spec = {"deadNodes": {"action": "OutOfService"}, "drain": {"evictAfterSeconds": 10}}
    cluster = Cluster(spec=spec, may_write=False)
    cluster.facts = {"strangers": {"n1": 0}}
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    for _ in range(20):
        assert not [s for s in steps(cluster.look(30)) if isinstance(s, PatchNode)]
    assert cluster.in_repair == {"n1"}
    assert cluster.says("NodeRepair")[0] == "Disabled"
