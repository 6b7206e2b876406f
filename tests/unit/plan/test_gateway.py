"""A namespace's gateway: made for its fleets, written once, its secret never read."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.resources import (
    BUDGETS,
    DEPLOYMENTS,
    FLEETS,
    PODS,
    ROLE_BINDINGS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    Ref,
)
from tandem_operator.settings import Settings

PARTS = (SERVICE_ACCOUNTS, ROLE_BINDINGS, DEPLOYMENTS, SERVICES, BUDGETS)


@pytest.fixture
async def world() -> World:
    world = World(Settings(gateway_replicas=3, gateway_service_type="LoadBalancer"))
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    return world


def owners(body: dict[str, Any]) -> list[str]:
    return [owner["name"] for owner in body["metadata"]["ownerReferences"]]


async def test_every_part_is_made_as_set(world: World) -> None:
    for resource in PARTS:
        assert owners(world.body(resource, "tandem-gateway")) == ["chat"]
    assert world.body(DEPLOYMENTS, "tandem-gateway")["spec"]["replicas"] == 3
    assert world.body(SERVICES, "tandem-gateway")["spec"]["type"] == "LoadBalancer"
    secret = world.body(SECRETS, "tandem-handoff")
    assert owners(secret) == ["tandem-gateway"]
    assert set(secret["data"]) == {"key"}


async def test_fleets_own_it_together_and_the_last_takes_it_along(world: World) -> None:
    world.clock.sleep(1.0)
    world.kube.user_write(fleet_body("other", prefill=None))
    await world.settle()
    for resource in PARTS:
        assert owners(world.body(resource, "tandem-gateway")) == ["chat", "other"]
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "chat"))
    await world.settle()
    for resource in PARTS:
        assert owners(world.body(resource, "tandem-gateway")) == ["other"]
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "other"))
    await world.settle()
    assert not [kind for kind, _, _ in world.kube.objects if kind in (*PARTS, SECRETS)]
    world.kube.user_write(fleet_body("again", prefill=None))
    await world.settle()
    assert world.body(SECRETS, "tandem-handoff")


async def test_what_others_change_is_put_back(world: World) -> None:
    world.body(DEPLOYMENTS, "tandem-gateway")["spec"]["replicas"] = 1
    await world.settle()
    assert world.body(DEPLOYMENTS, "tandem-gateway")["spec"]["replicas"] == 3


async def test_the_load_balancers_address_is_the_url(world: World) -> None:
    annotations = world.body(SERVICES, "tandem-gateway")["metadata"]["annotations"]
    annotations["tandem.dev/external-url"] = "127.0.0.1:30080"
    await world.settle()
    assert world.body(FLEETS, "chat")["status"]["url"] == "http://127.0.0.1:30080"


async def test_a_secret_that_pods_seem_to_miss_is_made_again(world: World) -> None:
    world.kube.vanish(Ref(SECRETS, NAMESPACE, "tandem-handoff"))
    await world.settle()
    assert (SECRETS, NAMESPACE, "tandem-handoff") not in world.kube.objects
    name = sorted(world.pods("chat-decode"))[0]
    pod = world.body(PODS, name)
    pod["spec"]["nodeName"] = "node-1"
    waiting = {"name": "runtime", "state": {"waiting": {"reason": "ContainerCreating"}}}
    pod["status"] = {"containerStatuses": [waiting]}
    world.clock.sleep(61.0)
    await world.reconcile()
    assert world.body(SECRETS, "tandem-handoff")
