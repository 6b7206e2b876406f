"""A namespace whose ResourceQuota is exactly as large as the fleet, as with bought accelerators."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.kube.client import ApiError
from tandem_operator.resources import FLEETS, PODS, Ref, resource_of

Body = dict[str, Any]
PODS_ALLOWED = 3


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A fleet that serves and leaves nothing of the quota."""
    world = World()
    original = world.kube.create

    async def create(manifest: Body, **rest: Any) -> Body:
        if resource_of(manifest) == PODS and len(world.kube.pods(NAMESPACE)) >= PODS_ALLOWED:
            name = manifest["metadata"]["name"]
            sentence = f'pods "{name}" is forbidden: exceeded quota: gpus, used: pods=3'
            raise ApiError(403, "Forbidden", sentence)
        return await original(manifest, **rest)

    monkeypatch.setattr(world.kube, "create", create)
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    return world


def edit(surge: int, unavailable: int) -> Any:
    def change(body: Body) -> None:
        container = {"name": "runtime", "env": [{"name": "V", "value": "2"}]}
        for role in ("prefill", "decode"):
            body["spec"][role]["template"] = {"spec": {"containers": [container]}}
        body["spec"]["rollout"] |= {"maxSurge": surge, "maxUnavailable": unavailable}

    return change


async def test_pods_are_replaced_in_place_where_the_fleet_says_so(world: World) -> None:
    before = set(world.pods("chat-decode").values())
    world.edit(FLEETS, "chat", edit(0, 1))
    await world.settle()
    after = list(world.pods("chat-decode").values())
    assert len(after) == 2
    assert not set(after) & before
    assert world.condition("Ready").status == "True"


async def test_a_surge_that_the_quota_refuses_says_what_would_fit(world: World) -> None:
    before = world.pods("chat-decode")
    world.edit(FLEETS, "chat", edit(1, 0))
    await world.settle()
    assert world.pods("chat-decode") == before
    status, reason, sentence = world.condition("TemplateValid")
    assert (status, reason) == ("False", "QuotaExceeded")
    assert "exceeded quota" in sentence
    assert "maxSurge: 0" in sentence
    world.edit(FLEETS, "chat", edit(0, 1))
    await world.settle()
    assert world.condition("Ready").status == "True"


async def test_a_first_pod_that_the_quota_refuses_is_told(world: World) -> None:
    world.kube.user_write(fleet_body("second", prefill=None, decode={"replicas": 1}))
    await world.settle()
    assert world.condition("Ready", "second")[:2] == ("False", "QuotaExceeded")
    assert "maxSurge" not in world.condition("Ready", "second").sentence
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "chat"))
    await world.settle()
    world.clock.sleep(300.0)
    await world.settle()
    assert world.condition("TemplateValid", "second").status == "True"
