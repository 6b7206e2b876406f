"""Which pod answers to which name: a pod never for a Model whose weights it does not have."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.resources import FLEETS, MODELS, PODS, Ref

Body = dict[str, Any]


@pytest.fixture
async def world() -> World:
    """A fleet that serves."""
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    return world


def names(world: World, model: str) -> set[str]:
    """What the pods with a Model's weights answer to."""
    return {
        pod["metadata"]["annotations"]["tandem.dev/served-names"]
        for pod in world.kube.pods(NAMESPACE)
        if pod["metadata"]["labels"]["tandem.dev/model"] == model
    }


async def test_a_deleted_model_takes_no_name_away(world: World) -> None:
    world.kube.vanish(Ref(MODELS, NAMESPACE, "smollm2"))
    await world.settle()
    assert names(world, "smollm2") == {"smollm2"}
    assert world.body(FLEETS, "chat")["status"]["servedNames"] == ["smollm2"]
    assert world.condition("NamesServed").status == "True"
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.settle()
    assert len(world.pods("chat-decode")) == 2
    assert names(world, "smollm2") == {"smollm2"}


async def test_a_name_of_a_deleted_model_is_still_taken(world: World) -> None:
    world.kube.vanish(Ref(MODELS, NAMESPACE, "smollm2"))
    world.kube.user_write(model_body("other", servedNames=["smollm2"]))
    world.clock.sleep(5.0)
    younger = fleet_body("younger", prefill=None, decode={"replicas": 1})
    younger["spec"]["modelRef"] = {"name": "other"}
    world.kube.user_write(younger)
    await world.settle()
    assert world.condition("Ready", "younger")[:2] == ("False", "NameConflict")


@pytest.mark.parametrize("successor", ["other", "nope"])
async def test_old_weights_never_answer_to_the_new_models_name(
    world: World, successor: str
) -> None:
    """Neither while the rollout has not begun, nor when an old pod has to be made again."""
    world.kube.user_write(model_body("other"))
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(modelRef={"name": successor}))
    await world.reconcile()
    await world.reconcile()
    assert names(world, "smollm2") == {"smollm2"}
    lost = sorted(world.pods("chat-decode"))[0]
    world.lose(lost)
    await world.reconcile()
    assert names(world, "smollm2") == {"smollm2"}
    await world.settle()
    if successor == "other":
        assert (names(world, "smollm2"), names(world, "other")) == (set(), {"other"})
    else:
        assert names(world, "smollm2") == {"smollm2"}


async def test_two_models_of_one_name_hand_it_over(world: World) -> None:
    world.kube.user_write(model_body("other", servedNames=["smollm2"]))
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(modelRef={"name": "other"}))
    await world.settle()
    assert names(world, "other") == {"smollm2"}
    pods = world.pods("chat-decode")
    assert all(
        world.body(PODS, p)["metadata"]["labels"]["tandem.dev/model"] == "other" for p in pods
    )
