"""A node in repair and the fleets on it, through the whole loop: who leaves, where, and undone."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.plan.actions import Evict, Notify
from tandem_operator.plan.views import pod_view
from tandem_operator.readers import CLUSTER
from tandem_operator.resources import NODE_HEALTH_POLICIES, NODES, PODS
from tandem_operator.settings import Settings

Body = dict[str, Any]
NAMES = ("n0", "n1", "n2", "n3")


class Crash(Exception):
    """The process is gone."""


class Nodes:
    """Four nodes, a scheduler that takes the first that a pod may come to, a policy."""

    def __init__(self, world: World, **spec: Any) -> None:
        self.world = world
        for name in NAMES:
            ready = {"type": "Ready", "status": "True"}
            self._write(NODES.kind, "v1", name, spec={}, status={"conditions": [ready]})
        self._write(
            NODE_HEALTH_POLICIES.kind,
            NODE_HEALTH_POLICIES.api_version,
            "default",
            spec={"mode": "Active", **spec},
        )

    def _write(self, kind: str, version: str, name: str, **body: Any) -> None:
        head: Body = {"apiVersion": version, "kind": kind, "metadata": {"name": name}}
        self.world.kube.user_write(head | body)

    def body(self, name: str) -> Body:
        return self.world.kube.objects[NODES, CLUSTER, name]

    def say(self, name: str, ready: str) -> None:
        self.body(name)["status"] = {"conditions": [{"type": "Ready", "status": ready}]}

    def schedule(self) -> None:
        used = [p["spec"].get("nodeName") for p in self.world.kube.pods(NAMESPACE)]
        here = [n for n in NAMES if (NODES, CLUSTER, n) in self.world.kube.objects]
        for pod in self.world.kube.pods(NAMESPACE):
            if "nodeName" in pod["spec"]:
                continue
            free = [n for n in here if not self.body(n)["spec"].get("unschedulable")]
            allowed = sorted((n for n in free if n not in away_from(pod)), key=used.count)
            pod["spec"]["nodeName"] = allowed[0]
            used.append(allowed[0])

    async def pass_by(self, seconds: float, times: int = 1) -> None:
        for _ in range(times):
            self.world.clock.sleep(seconds)
            await self.world.reconcile()
            self.schedule()
            self.world.kubelet()

    @property
    def entry(self) -> Body | None:
        policy = self.world.kube.objects[NODE_HEALTH_POLICIES, CLUSTER, "default"]
        entries = policy.get("status", {}).get("nodes", [])
        return entries[0] if entries else None

    def on(self, name: str) -> set[str]:
        """Decode pods on a node."""
        return {p for p in self.world.pods("chat-decode") if self.node_of(p) == name}

    def node_of(self, pod: str) -> str:
        node: str = self.world.body(PODS, pod)["spec"]["nodeName"]
        return node


def away_from(pod: Body) -> set[str]:
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return {
        value
        for term in terms.get("nodeSelectorTerms", ())
        for field in term.get("matchFields", ())
        for value in field["values"]
    }


async def serving(*, may_write: bool = True, **spec: Any) -> tuple[World, Nodes]:
    world = World(Settings(node_repair=may_write))
    nodes = Nodes(world, **spec)
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body(decode={"replicas": 3}))
    await nodes.pass_by(1.0, 12)
    assert world.condition("Ready").status == "True"
    return world, nodes


async def test_a_node_that_is_deleted_takes_its_pods_along() -> None:
    """Nobody says so of the pods: they look Ready until Kubernetes' garbage collector comes."""
    world, nodes = await serving()
    node = nodes.node_of(min(world.pods("chat-decode")))
    lost = nodes.on(node)
    others = world.pods("chat-decode").keys() - lost
    del world.kube.objects[NODES, CLUSTER, node]
    await world.reconcile()
    new = world.pods("chat-decode").keys() - others - lost
    assert len(new) == len(lost), "each is replaced at once"
    assert not lost & world.draining, "nobody leaves before others serve"
    await nodes.pass_by(1.0, 3)
    assert not lost & world.pods("chat-decode").keys(), "others serve in their stead"


async def test_a_node_that_the_watch_does_not_show_yet_is_not_gone() -> None:
    world, nodes = await serving()
    node = nodes.node_of(min(world.pods("chat-decode")))
    before = world.pods("chat-decode").keys()
    world.freeze()
    assert world.stale is not None
    shown = world.stale[NODES, CLUSTER]
    world.stale[NODES, CLUSTER] = [body for body in shown if body["metadata"]["name"] != node]
    await world.reconcile()
    world.thaw()
    assert world.pods("chat-decode").keys() == before


async def fail(nodes: Nodes) -> str:
    """One of the nodes says that it is not ready, for long enough."""
    node = nodes.node_of(min(nodes.world.pods("chat-decode")))
    nodes.say(node, "False")
    await nodes.pass_by(1.0)
    nodes.world.clock.sleep(60.0)
    return node


@pytest.mark.parametrize("may_write", [True, False])
async def test_pods_are_replaced_elsewhere_before_they_leave(may_write: bool) -> None:
    world, nodes = await serving(may_write=may_write)
    node = await fail(nodes)
    await nodes.pass_by(1.0)
    assert nodes.entry is not None
    assert nodes.entry["phase"] == "Draining"
    for _ in range(12):
        await nodes.pass_by(1.0)
        bodies = [world.body(PODS, name) for name in world.pods("chat-decode")]
        serve = [p for p in map(pod_view, bodies) if p.ready and not p.draining]
        assert len(serve) >= 3, "surge first"
    assert nodes.on(node) == set()
    assert len(world.pods("chat-decode")) == 3
    assert bool(nodes.body(node)["spec"].get("unschedulable")) == may_write
    assert nodes.entry["phase"] == "Drained"
    nodes.say(node, "True")
    await nodes.pass_by(1.0)
    await nodes.pass_by(121.0, 2)
    assert nodes.entry is None
    assert not nodes.body(node)["spec"].get("unschedulable")
    assert not nodes.body(node)["metadata"].get("annotations")
    reasons = [event.reason for event in world.events]
    assert "NodeDraining" in reasons
    assert "NodeRecovered" in reasons


async def test_a_recovered_node_keeps_pods_that_had_not_left_yet() -> None:
    world, nodes = await serving()
    world.is_bad = lambda pod: bool(away_from(pod))  # type: ignore[method-assign]
    node = await fail(nodes)
    before = nodes.on(node)
    await nodes.pass_by(1.0, 5)
    assert nodes.on(node) == before, "no other one serves"
    nodes.say(node, "True")
    await nodes.pass_by(1.0)
    await nodes.pass_by(121.0, 5)
    assert nodes.on(node) == before
    assert len(world.pods("chat-decode")) == 3


async def test_an_eviction_that_is_refused_is_told_and_no_failure() -> None:
    sentence = "Cannot evict pod as it would violate the pod's disruption budget."
    drain = {"evictAfterSeconds": 5, "deadlineSeconds": 700, "afterDeadline": "Delete"}
    world, nodes = await serving(drain=drain)
    world.is_bad = lambda pod: bool(away_from(pod))  # type: ignore[method-assign]
    node = await fail(nodes)
    stuck = min(nodes.on(node))
    world.kube.evictions = {stuck: sentence}
    await nodes.pass_by(3.0, 6)
    assert stuck in world.pods("chat-decode")
    assert nodes.entry is not None
    assert f"team/{stuck} ({sentence})" in nodes.entry["message"]
    count = world.metrics.actions.labels("Evict", "NodeDraining", "refused")._value.get()
    assert count > 1
    world.clock.sleep(700.0)
    await nodes.pass_by(1.0, 2)
    assert stuck not in world.pods("chat-decode"), "after the deadline, as the policy says"


async def test_every_crash_ends_where_no_crash_ends() -> None:
    """The operator dies after its k-th action of a repair, for every k."""

    async def run(dies_after: int | None) -> tuple[int, Body]:
        world, nodes = await serving()
        node, count = await fail(nodes), 0

        def fault(action: object) -> str | None:
            nonlocal count
            if isinstance(action, Notify):
                return None
            assert not isinstance(action, Evict)
            count += 1
            if dies_after is not None and count > dies_after:
                raise Crash
            return None

        world.fault = fault

        async def pass_by(seconds: float, times: int = 1) -> None:
            for _ in range(times):
                try:
                    await nodes.pass_by(seconds)
                except Crash:
                    world.fault = lambda action: None
                    world.restart()

        await pass_by(1.0, 14)
        drained = nodes.on(node) == set() and nodes.body(node)["spec"]["unschedulable"]
        nodes.say(node, "True")
        await pass_by(1.0, 2)
        await pass_by(121.0, 3)
        rest = nodes.body(node)["metadata"].get("annotations") or nodes.body(node)["spec"]
        return count, {"drained": drained, "pods": len(world.pods("chat-decode")), "rest": rest}

    actions, undisturbed = await run(None)
    assert undisturbed == {"drained": True, "pods": 3, "rest": {}}
    assert actions > 5
    for k in range(actions):
        assert (await run(k))[1] == undisturbed, f"dying after {k} of {actions} actions"
