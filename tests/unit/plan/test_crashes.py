"""The operator dies after its k-th write of a change, for every k: the end is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.plan.actions import Notify
from tandem_operator.resources import FLEETS, PODS, POOLS, REVISIONS

Body = dict[str, Any]


def roll(body: Body) -> None:
    env = [{"name": "V", "value": "2"}]
    for role in ("prefill", "decode"):
        body["spec"][role]["template"] = {"spec": {"containers": [{"name": "runtime", "env": env}]}}


def shrink(body: Body) -> None:
    body["spec"]["decode"]["replicas"] = 1


def grow(body: Body) -> None:
    body["spec"]["decode"]["replicas"] = 5


def aggregate(body: Body) -> None:
    body["spec"].pop("prefill")


def nothing(body: Body) -> None:
    """From the very beginning."""


CHANGES = {"roll": roll, "shrink": shrink, "grow": grow, "aggregate": aggregate, "start": nothing}


class Crash(Exception):
    """The process is gone."""


async def world_before(change: Callable[[Body], None]) -> World:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    if change is not nothing:
        await world.settle()
        world.edit(FLEETS, "chat", change)
    return world


def end_state(world: World) -> dict[str, Any]:
    """What was made, without names that depend on which slot was free."""
    objects = [copy.deepcopy(b) for (_, ns, _), b in world.kube.objects.items() if ns == NAMESPACE]
    pods = sorted(
        str((b["metadata"]["labels"], sorted(b["metadata"]["annotations"]), b["spec"]))
        for b in objects
        if b["kind"] == PODS.kind
    )
    return {
        "pods": pods,
        "pools": sorted(str(b["spec"]) for b in objects if b["kind"] == POOLS.kind),
        "revisions": sorted(b["metadata"]["name"] for b in objects if b["kind"] == REVISIONS.kind),
        "kinds": sorted(b["kind"] for b in objects),
        "ready": world.condition("Ready")[:2],
    }


async def run(world: World, dies_after: int | None) -> int:
    """Settle, dying once after that many actions; how many actions there were."""
    count = 0

    def fault(action: object) -> str | None:
        nonlocal count
        if isinstance(action, Notify):
            return None
        count += 1
        if dies_after is not None and count > dies_after:
            raise Crash
        return None

    world.fault = fault
    try:
        await world.settle()
    except Crash:
        world.fault = lambda action: None
        world.restart()
        await world.settle()
    return count


@pytest.mark.parametrize("name", CHANGES)
async def test_every_crash_ends_where_no_crash_ends(name: str) -> None:
    change = CHANGES[name]
    world = await world_before(change)
    actions = await run(world, None)
    undisturbed = end_state(world)
    assert undisturbed["ready"] == ("True", "Serving")
    assert actions > 5
    for k in range(actions):
        world = await world_before(change)
        await run(world, k)
        assert end_state(world) == undisturbed, f"dying after {k} of {actions} actions"
