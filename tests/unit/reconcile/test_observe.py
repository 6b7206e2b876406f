"""Snapshots: cached or live, without ghosts, with what pods say."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.keys import Key, gateway_key
from tandem_operator.kube.client import ApiError
from tandem_operator.resources import BUDGETS, FLEETS, PODS, POOLS, REVISIONS, Ref, Resource

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


async def test_what_is_made_while_a_live_read_runs_is_no_ghost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fleet reads live while another makes a pod; the watch tells of it before the answer."""
    original = world.kube.list

    async def slow_list(resource: Resource, *rest: Any) -> list[Any]:
        answer = await original(resource, *rest)
        if resource == PODS and not world.pods("late-decode"):
            labels = {**world.body(PODS, name)["metadata"]["labels"]}
            labels |= {"tandem.dev/fleet": "late", "tandem.dev/pool": "late-decode"}
            pod = {"apiVersion": "v1", "kind": "Pod", "spec": {}}
            meta = {"name": "late-decode-x-0", "namespace": NAMESPACE, "labels": labels}
            world.kube.user_write({**pod, "metadata": meta})
        return answer

    name = sorted(world.pods("chat-decode"))[0]
    monkeypatch.setattr(world.kube, "list", slow_list)
    gateway = gateway_key(NAMESPACE)  # It reads the whole namespace's pods.
    await world.reconciler._observer.gateway(gateway, live=True)
    late = Key("InferenceFleet", NAMESPACE, "late")
    snapshot = await world.reconciler._observer.fleet(late, live=False)
    assert [pod.name for pod in snapshot.pods] == ["late-decode-x-0"]


async def test_a_ghost_is_forgotten_with_the_watch_and_comes_back_when_found(world: World) -> None:
    name, _ = sorted(world.pods("chat-decode"))
    body = world.body(PODS, name)
    world.kube.objects.pop((PODS, NAMESPACE, name))  # For a while its labels did not match.
    cached = world.objects
    world.objects = lambda r, ns: [*cached(r, ns), *([body] if r == PODS else [])]  # type: ignore[method-assign]
    observer = world.reconciler._observer
    await observer.fleet(CHAT, live=True)
    assert name not in {pod.name for pod in (await observer.fleet(CHAT, live=False)).pods}
    world.objects = cached  # type: ignore[method-assign]
    world.kube.objects[PODS, NAMESPACE, name] = body
    await observer.fleet(CHAT, live=True)
    assert name in {pod.name for pod in (await observer.fleet(CHAT, live=False)).pods}
    assert observer._cached._ghosts == {}  # type: ignore[attr-defined]


async def test_a_live_read_of_a_fleet_reads_only_its_own_pods(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    selectors: dict[Resource, Any] = {}
    original = world.kube.list

    async def spy(resource: Resource, namespace: str, labels: Any) -> list[Any]:
        selectors[resource] = labels
        return await original(resource, namespace, labels)

    monkeypatch.setattr(world.kube, "list", spy)
    await world.reconciler._observer.fleet(CHAT, live=True)
    assert all(
        selectors[r]["tandem.dev/fleet"] == "chat" for r in (PODS, POOLS, REVISIONS, BUDGETS)
    )


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
    await world.reconcile()
    available = world.condition("DecodeAvailable")
    assert available == ("True", "PodsReady", f"1/2 pods are Ready: {sentence}")
    assert sentence in world.condition("Ready").sentence
    await world.reconcile()
    assert await world.reconcile() == 0, "it says the same again and again"
    world.kube.refuse = {}
    await world.settle()
    assert len(world.pods("chat-decode")) == 2
    assert world.condition("DecodeAvailable").sentence == "2/2 pods are Ready"


async def test_first_pods_that_are_refused_are_told() -> None:
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    sentence = "pods is forbidden: no"
    await world.reconcile()
    await world.reconcile()
    pools = [pod["metadata"]["name"] for pod in world.kube.pods(NAMESPACE)]
    assert not pools
    world.kube.refuse = dict.fromkeys(
        ("chat-decode-", "chat-prefill-"), ApiError(403, "Forbidden", sentence)
    )
    for _ in range(4):
        await world.reconcile()
    assert world.condition("Ready")[:2] == ("False", "WriteRefused")
    assert sentence in world.condition("Reconciling").sentence
    world.kube.refuse = {}
    await world.settle()
    assert world.condition("Ready").status == "True"
