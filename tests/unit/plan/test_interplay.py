"""What changes a fleet's pods, all of it at once: load, sleep, rollouts and drained nodes."""

from __future__ import annotations

import random

import pytest
from autoscaled import Load, autoscaled_fleet, gateway_pod, policy, size
from builders import NAMESPACE
from operator_world import World
from tandem_operator.readers import CLUSTER
from tandem_operator.resources import FLEETS, NODES, PODS
from tandem_operator.settings import DRAIN_TAINTS
from tandem_runtime.contract import ANNOTATION_DRAINING


class Nodes:
    """Three nodes that are drained and come back, and one that stays."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.drained: set[str] = set()
        self.toggle("n0")
        self.toggle("n0")

    def toggle(self, name: str) -> None:
        self.drained ^= {name}
        taints = [{"key": DRAIN_TAINTS[0], "effect": "NoSchedule"}]
        for node in ("n0", "n1", "n2", "n3"):
            spec = {"taints": taints if node in self.drained else []}
            body = {"metadata": {"name": node, "uid": node}, "spec": spec}
            self.world.kube.objects[NODES, CLUSTER, node] = body

    def schedule(self, chance: random.Random) -> None:
        free = sorted({"n0", "n1", "n2", "n3"} - self.drained)
        for pod in self.world.kube.pods(NAMESPACE):
            pod["spec"].setdefault("nodeName", chance.choice(free))


@pytest.mark.parametrize("seed", range(3))
async def test_all_at_once_comes_to_rest_and_no_stream_is_ended(seed: int) -> None:
    world = await autoscaled_fleet()
    load, chance, nodes = Load(world), random.Random(seed), Nodes(world)
    gateway_pod(world)
    zero = {"minReplicas": 0, "maxReplicas": 8, "policyRef": {"name": "p"}}
    world.kube.user_write(policy(windows={"idleSeconds": 60}))
    pools = {"prefill": {"scaling": zero}, "decode": {"scaling": zero}}
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(pools))

    async def look(ticks: int, *, calm: bool) -> None:
        for tick in range(ticks):
            event = 1.0 if calm else chance.random()
            if event < 0.06:
                nodes.toggle(chance.choice(["n0", "n1", "n2"]))
            elif event < 0.12:
                load.streams = chance.choice([0.0, 0.0, 10.0, 60.0, 200.0, 400.0])
            elif event < 0.15:
                template = {"metadata": {"labels": {"tick": str(tick)}}}
                world.edit(
                    FLEETS, "chat", lambda b, t=template: b["spec"]["decode"].update(template=t)
                )
            world.held = {"chat": 3} if load.streams and not size(world) else {}
            await load.look(chance.choice([1.0, 5.0, 5.0]))
            nodes.schedule(chance)
            assert world.condition("ScalingActive").reason == "Scaling"

    await look(120, calm=False)
    load.streams = 60.0
    await look(10, calm=True)
    served_on = {world.body(PODS, name)["spec"]["nodeName"] for name in world.pods("chat-decode")}
    assert served_on.isdisjoint(nodes.drained)
    # The nodes that it serves on now, and the others are free again.
    for node in sorted((served_on - {"n3"} or served_on) | nodes.drained):
        nodes.toggle(node)
    await look(30, calm=True)
    assert world.ended == []
    assert world.condition("Ready").status == "True"
    for pool in ("chat-decode", "chat-prefill"):
        pods = [world.body(PODS, name) for name in world.pods(pool)]
        assert len(pods) == size(world, pool)
        assert nodes.drained.isdisjoint(pod["spec"]["nodeName"] for pod in pods)
        assert not [p for p in pods if ANNOTATION_DRAINING in p["metadata"]["annotations"]]
