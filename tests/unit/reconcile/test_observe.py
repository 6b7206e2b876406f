"""Snapshots: cached or live, without ghosts, with what pods say."""

from __future__ import annotations

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.keys import Key
from tandem_operator.kube.client import ApiError
from tandem_operator.resources import FLEETS, PODS, Ref

CHAT = Key("InferenceFleet", NAMESPACE, "chat")


@pytest.fixture
async def world() -> World:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    return world


async def test_what_destroys_is_planned_on_live_reads(world: World) -> None:
    """The cache still shows two decode pods of which one is gone: nothing may be taken."""
    first, second = sorted(world.pods("chat-decode"))
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=1))
    world.freeze()
    world.lose(first)
    for _ in range(3):
        await world.reconcile()
    assert list(world.pods("chat-decode")) == [second]
    assert world.draining == set()


async def test_a_deletion_that_the_watch_missed_is_found_by_the_resync(world: World) -> None:
    first, _ = sorted(world.pods("chat-decode"))
    world.freeze()
    world.lose(first)
    await world.reconcile()
    assert len(world.pods("chat-decode")) == 1, "the ghost was not believed: test is worthless"
    world.clock.sleep(300.0)
    await world.reconcile()
    assert len(world.pods("chat-decode")) == 2


async def test_making_what_is_there_already_is_no_fault(world: World) -> None:
    world.freeze()
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=3))
    world.freeze()
    before = len(world.pods("chat-decode"))
    for _ in range(4):
        await world.reconcile()
    assert len(world.pods("chat-decode")) == before + 1


async def test_a_fleet_that_is_not_understood_does_not_stop_the_others(world: World) -> None:
    broken = fleet_body("broken")
    broken["spec"]["decode"]["replicas"] = "many"
    world.kube.user_write(broken)
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.settle()
    assert len(world.pods("chat-decode")) == 2


async def test_a_silent_pod_is_left_out(world: World) -> None:
    first, second = sorted(world.pods("chat-decode"))
    world.body(PODS, first)["metadata"]["annotations"]["tandem.dev/draining"] = "ScaleIn"
    world.body(PODS, first)["status"]["podIP"] = "127.9.9.9"
    world.body(PODS, second)["status"]["podIP"] = "127.0.0.2"
    original = world.state

    async def state(host: str) -> object:
        if host == "127.9.9.9":
            raise OSError("refused")
        return await original(host)

    world.state = state  # type: ignore[method-assign, assignment]
    snapshot = await world.reconciler._observer.fleet(CHAT, live=False)
    uids = {world.body(PODS, second)["metadata"]["uid"]}
    prefill = next(iter(world.pods("chat-prefill")))
    assert set(snapshot.states) == uids | {world.body(PODS, prefill)["metadata"]["uid"]}


async def test_no_pod_is_asked_while_nothing_has_to_go(world: World) -> None:
    snapshot = await world.reconciler._observer.fleet(CHAT, live=False)
    assert snapshot.states == {}


async def test_a_refused_pod_is_told_to_the_user_and_tried_again(world: World) -> None:
    sentence = "pods is forbidden: exceeded quota: pods=3"
    world.lose(sorted(world.pods("chat-decode"))[0])
    world.kube.refuse = {"chat-decode-": ApiError(403, "Forbidden", sentence)}
    await world.reconcile()
    told = [e for e in world.events if e.reason == "WriteRefused"]
    assert len(told) == 1
    assert sentence in told[0].note
    assert told[0].regarding == Ref(FLEETS, NAMESPACE, "chat", told[0].regarding.uid)
    world.kube.refuse = {}
    await world.settle()
    assert len(world.pods("chat-decode")) == 2
