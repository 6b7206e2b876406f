"""The steps of a repair, each of which can be undone."""

from __future__ import annotations

import pytest
from node_cluster import CONDITIONS, Cluster, names, node, pod, steps
from tandem_operator.api.node_health import NodeHealthPolicySpec
from tandem_operator.names import Reason
from tandem_operator.plan.actions import Notify, PatchNode
from tandem_operator.plan.nodes.repair import repair_of
from tandem_operator.plan.nodes.view import Straggler


def test_the_steps_of_a_drain_in_their_order() -> None:
    spec = {"drain": {"evictAfterSeconds": 100, "deadlineSeconds": 700, "afterDeadline": "Delete"}}
    cluster = Cluster(spec=spec)
    cluster.pods["gateway"] = pod("gateway", "n1", runtime=False, pool="", fleet="")
    cluster.silence("n1")
    cluster.look()
    assert not steps(cluster.look(60)), "first the status says so"
    assert [type(s) for s in steps(cluster.look(1))] == [PatchNode]
    assert cluster.cordoned == {"n1"}
    assert names(steps(cluster.look(1))) == [("Evict", "gateway")]
    assert names(steps(cluster.look(100))) == [("Evict", "gateway"), ("Evict", "p1")]
    del cluster.pods["gateway"]
    cluster.facts = {"refusals": {"uid-p1": "Cannot evict pod"}}
    cluster.look(1)
    assert "team/p1 (Cannot evict pod)" in cluster.expect("n1").message
    late = cluster.look(700)
    assert names(steps(late)) == [("Delete", "p1")]
    (event,) = (a for a in late.actions if isinstance(a, Notify))
    assert (event.regarding.name, event.reason) == ("p1", Reason.DRAIN_TIMED_OUT)
    assert event.note.startswith("it did not leave n1 in time and is deleted, whatever budgets say")
    del cluster.pods["p1"]
    cluster.look(1)
    assert cluster.phase("n1") == "Drained"


def test_after_the_deadline_one_waits_unless_told_otherwise() -> None:
    cluster = Cluster(spec={"drain": {"evictAfterSeconds": 0, "deadlineSeconds": 630}})
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    cluster.look(1)
    assert names(steps(cluster.look(1))) == [("Evict", "p1")]
    for _ in range(5):
        assert not steps(cluster.look(700))
    assert cluster.phase("n1") == "Draining"


def test_no_pod_gets_less_than_its_grace_period() -> None:
    spec = {"drain": {"evictAfterSeconds": 0, "deadlineSeconds": 60, "afterDeadline": "Delete"}}
    cluster = Cluster(spec=spec)
    cluster.silence("n1")
    cluster.look()
    reason, message = cluster.says("Ready")
    assert reason == "DeadlineTooShort"
    assert "drain.deadlineSeconds 60 is under the 630 s" in message
    assert "fleet team/chat" in message
    cluster.look(60)
    cluster.look(1)
    assert names(steps(cluster.look(620))) == [("Evict", "p1")]
    assert names(steps(cluster.look(10))) == [("Delete", "p1")]


def test_the_last_serving_pod_of_a_pool_is_never_deleted() -> None:
    spec = {"drain": {"evictAfterSeconds": 0, "deadlineSeconds": 60, "afterDeadline": "Delete"}}
    cluster = Cluster(spec=spec)
    cluster.pods = {"p1": pod("p1", "n1")}
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    cluster.look(1)
    assert not steps(cluster.look(10_000))
    cluster.pods["p1"] = pod("p1", "n1", ready=False)
    assert names(steps(cluster.look(1))) == [("Delete", "p1")]


def test_pods_that_end_already_are_waited_for() -> None:
    spec = {"drain": {"evictAfterSeconds": 0, "deadlineSeconds": 60, "afterDeadline": "Delete"}}
    cluster = Cluster(spec=spec)
    cluster.pods["p1"] = pod("p1", "n1", terminating=True, finalizers=("example.com/hold",))
    cluster.pods["q1"] = pod("q1", "n1", draining=True)
    cluster.condition("n1", "Ready", "False")
    cluster.look()
    cluster.look(60)
    cluster.look(1)
    assert not steps(cluster.look(300)), "one ends, the other is being emptied by its fleet"
    message = cluster.expect("n1").message
    assert "team/p1 (ending, held by example.com/hold)" in message


@pytest.mark.parametrize("at", range(1, 6))
def test_recovery_at_any_step_cancels(at: int) -> None:
    spec = {"drain": {"evictAfterSeconds": 20, "deadlineSeconds": 700}}
    cluster = Cluster(spec=spec)
    cluster.silence("n1")
    cluster.look()
    cluster.look(60)
    for _ in range(at):
        cluster.look(10)
    assert cluster.in_repair == {"n1"}
    cluster.recover("n1")
    cluster.look(1)
    cluster.look(121)
    cluster.look(1)
    assert cluster.status.nodes == ()
    assert cluster.cordoned == set()
    assert not steps(cluster.look(10_000))
    assert cluster.notes[-1][0] == Reason.NODE_RECOVERED


def test_a_dead_nodes_pods_are_removed_by_policy_alone() -> None:
    for action, gone in (("Wait", False), ("ForceDelete", True)):
        cluster = Cluster(spec={"deadNodes": {"action": action, "afterSeconds": 120}})
        cluster.pods["p1"] = pod("p1", "n1", terminating=True, ready=False)
        cluster.silence("n1")
        cluster.look()
        cluster.look(60)
        cluster.look(1)
        cluster.look(50)
        assert "p1" in cluster.pods
        cluster.look(10)
        assert ("p1" not in cluster.pods) == gone


def test_a_node_whose_pods_answer_is_not_dead() -> None:
    cluster = Cluster(spec={"deadNodes": {"action": "ForceDelete", "afterSeconds": 120}})
    cluster.facts = {"answered": frozenset({"uid-p1"})}
    cluster.silence("n1")
    cluster.look()
    for _ in range(10):
        cluster.look(60)
    assert "p1" in cluster.pods


@pytest.mark.parametrize("status", ["True", "False"])
def test_a_node_that_reports_is_not_dead(status: str) -> None:
    spec = {**CONDITIONS, "deadNodes": {"action": "ForceDelete", "afterSeconds": 120}}
    cluster = Cluster(spec=spec)
    cluster.condition("n1", "KernelDeadlock", "True")
    cluster.condition("n1", "Ready", status)
    cluster.look()
    for _ in range(10):
        cluster.look(60)
    assert "p1" in cluster.pods


def test_out_of_service_is_for_nodes_that_have_no_strangers() -> None:
    key = "node.kubernetes.io/out-of-service"
    spec = {"deadNodes": {"action": "OutOfService", "afterSeconds": 120}}
    for strangers, tainted in ({"n1": 0}, True), ({"n1": 1}, False), ({}, False):
        cluster = Cluster(spec=spec)
        mine = ("node.kubernetes.io/unreachable", "", "NoExecute")
        cluster.nodes["n1"] = node("n1", taints=(mine,))
        cluster.facts = {"strangers": strangers}
        cluster.silence("n1")
        cluster.look()
        cluster.look(60)
        for _ in range(4):
            cluster.look(30)
        assert ((key, "tandem", "NoExecute") in cluster.nodes["n1"].taints) == tainted
        assert mine in cluster.nodes["n1"].taints
        cluster.look(1)
        assert (cluster.phase("n1") == "OutOfService") == tainted
        cluster.recover("n1")
        cluster.look(1)
        cluster.look(121)
        assert cluster.nodes["n1"].taints == (mine,)
        assert not cluster.nodes["n1"].annotations


def test_a_straggler_leaves_alone_and_its_node_is_avoided() -> None:
    spec = {"signals": {"stragglers": {"avoidSeconds": 3600}}, "drain": {"evictAfterSeconds": 0}}
    cluster = Cluster(6, spec=spec)
    cluster.pods["q1"] = pod("q1", "n1")
    evidence = "p1 on n1: 1.27x its peers for 6 windows"
    cluster.facts = {"stragglers": (Straggler("uid-p1", evidence),)}
    cluster.look()
    assert evidence in cluster.expect("n1").message
    repair = repair_of(NodeHealthPolicySpec(mode="Active"), cluster.status)
    assert repair.nodes == frozenset()
    assert repair.pods == {"uid-p1"}
    assert repair.avoid == ("n1",)
    assert names(steps(cluster.look(1))) == [("Evict", "p1")]
    assert cluster.cordoned == set()
    del cluster.pods["p1"]
    cluster.facts = {}
    cluster.look(1000)
    assert cluster.phase("n1") == "Drained"
    cluster.look(3600)
    cluster.look(121)
    assert cluster.status.nodes == ()


def test_a_stragglers_node_takes_pods_again_without_anything_else_happening() -> None:
    spec = {"signals": {"stragglers": {"avoidSeconds": 3600}}, "drain": {"evictAfterSeconds": 0}}
    cluster = Cluster(6, spec=spec)
    cluster.facts = {"stragglers": (Straggler("uid-p1", "slow"),)}
    cluster.look()
    del cluster.pods["p1"]
    cluster.facts = {}
    plan = cluster.look(1000)
    assert cluster.phase("n1") == "Drained"
    waited_s = 0.0
    while cluster.status.nodes:
        assert plan.requeue_after_s is not None, "nobody would look again"
        plan = cluster.look(plan.requeue_after_s)
        waited_s += plan.requeue_after_s or 0.0
        assert waited_s < 7200


def test_a_straggler_that_was_held_and_is_none_any_more_is_forgotten() -> None:
    """Above all, its node is not drained as a whole."""
    cluster = Cluster(6, spec={"signals": {"stragglers": {}}})
    cluster.facts = {"stragglers": (Straggler("uid-p1", "slow"),)}
    cluster.annotations = {"tandem.dev/repair-paused": "true"}
    cluster.look()
    assert cluster.phase("n1") == "Held"
    cluster.facts, cluster.annotations = {}, {}
    cluster.look(1)
    assert cluster.phase("n1") == "Suspect"
    cluster.look(121)
    assert cluster.status.nodes == ()


def test_stragglers_of_one_pool_go_one_after_another() -> None:
    cluster = Cluster(20, spec={"signals": {"stragglers": {}}})
    found = tuple(Straggler(f"uid-p{i}", f"p{i} is slow") for i in range(3))
    cluster.facts = {"stragglers": found}
    cluster.look()
    cluster.look(1)
    assert len(cluster.in_repair) == 1
    (first,) = cluster.in_repair
    del cluster.pods[f"p{first[1:]}"]
    cluster.look(1)
    assert len(cluster.in_repair) == 2


def test_a_stragglers_node_that_dies_is_drained_as_a_whole() -> None:
    cluster = Cluster(6, spec={"signals": {"stragglers": {}}})
    cluster.pods["q1"] = pod("q1", "n1")
    cluster.facts = {"stragglers": (Straggler("uid-p1", "slow"),)}
    cluster.look()
    cluster.silence("n1")
    cluster.look(1)
    cluster.look(60)
    assert repair_of(NodeHealthPolicySpec(mode="Active"), cluster.status).nodes == {"n1"}


def slower(cluster: Cluster) -> dict[str, str]:
    """By name, the pods that get less traffic."""
    return {name: p.slower_percent for name, p in cluster.pods.items() if p.slower_percent}


def test_a_suspected_pod_gets_less_traffic_while_it_is_suspected() -> None:
    cluster = Cluster(6, spec={"signals": {"stragglers": {}}})
    cluster.facts = {"suspected": {"uid-p1": 30}}
    cluster.look()
    assert slower(cluster) == {"p1": "30"}
    assert not cluster.look(10).actions
    assert not cluster.in_repair, "nobody is sure yet"
    cluster.facts = {"suspected": {"uid-p2": 10}}
    cluster.look(10)
    assert slower(cluster) == {"p2": "10"}
    cluster.facts = {}
    cluster.look(10)
    assert slower(cluster) == {}


@pytest.mark.parametrize(
    "change",
    [{"spec": {"mode": "DryRun"}}, {"spec": {"mode": "Off"}}, {"spec": {"signals": {}}}, "paused",
     "no policy"],
)  # fmt: skip
def test_without_a_policy_that_acts_traffic_is_as_it_was(change: object) -> None:
    cluster = Cluster(6, spec={"signals": {"stragglers": {}}})
    cluster.facts = {"suspected": {"uid-p1": 30}}
    cluster.look()
    assert slower(cluster) == {"p1": "30"}
    if isinstance(change, dict):
        cluster.spec = {**cluster.spec, **change["spec"]}
    elif change == "paused":
        cluster.annotations = {"tandem.dev/repair-paused": "true"}
    else:
        cluster.policy_gone = True
    cluster.look(10)
    assert slower(cluster) == {}
    assert not cluster.look(10).actions
