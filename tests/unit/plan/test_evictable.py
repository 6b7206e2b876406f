"""Whether the cluster autoscaler may remove the node of a pod."""

from __future__ import annotations

import pytest
from builders import fleet_body, model_body
from operator_world import World
from tandem_operator.names import ANNOTATION_SAFE_TO_EVICT
from tandem_operator.resources import FLEETS, PODS
from tandem_runtime.contract import ANNOTATION_DRAINING


def marks(world: World) -> dict[str, str | None]:
    """By decode pod."""
    return {
        name: world.body(PODS, name)["metadata"]["annotations"].get(ANNOTATION_SAFE_TO_EVICT)
        for name in world.pods("chat-decode")
    }


async def serving(**spec: object) -> World:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body(**spec))
    await world.settle()
    return world


async def test_a_pod_may_go_once_it_leaves() -> None:
    world = await serving()
    assert set(marks(world).values()) == {"false"}
    for name in world.pods("chat-decode"):
        world.running[name] = 1
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=1))
    for _ in range(4):
        await world.reconcile()
    leaves = {
        name
        for name in world.pods("chat-decode")
        if ANNOTATION_DRAINING in world.body(PODS, name)["metadata"]["annotations"]
    }
    assert len(leaves) == 1
    assert {name for name, mark in marks(world).items() if mark == "true"} == leaves
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=2))
    for _ in range(4):
        await world.reconcile()
    assert set(marks(world).values()) == {"false"}, "it is wanted again"


async def test_a_budget_lets_pods_go_in_place() -> None:
    world = await serving()
    before = set(world.pods("chat-decode"))
    world.edit(FLEETS, "chat", lambda b: b["spec"]["disruption"].update(maxUnavailable=1))
    await world.settle()
    assert set(marks(world).values()) == {"true"}
    assert set(world.pods("chat-decode")) == before, "no rollout for it"


@pytest.mark.parametrize("text", ["true", "false"])
async def test_a_template_decides_for_itself(text: str) -> None:
    template = {"metadata": {"annotations": {ANNOTATION_SAFE_TO_EVICT: text}}}
    world = await serving(decode={"replicas": 2, "template": template})
    assert set(marks(world).values()) == {text}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["disruption"].update(maxUnavailable=1))
    await world.settle()
    assert set(marks(world).values()) == {text}
