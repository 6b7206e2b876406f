"""Objects that somebody else edits, or made with our labels."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem_operator.keys import Key
from tandem_operator.plan.times import to_text
from tandem_operator.resources import FLEETS, PODS, REVISIONS, Ref

Body = dict[str, Any]
OURS = "app.kubernetes.io/managed-by"


@pytest.fixture
async def world() -> World:
    """A fleet that serves."""
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    # The watch selects by label.
    seen = world.objects
    world.objects = lambda kind, ns: [  # type: ignore[method-assign]
        body
        for body in seen(kind, ns)
        if not kind.api_version.startswith(("v1", "apps"))
        or OURS in (body["metadata"].get("labels") or {})
    ]
    return world


@pytest.mark.parametrize("label", [OURS, "tandem.dev/fleet", "app.kubernetes.io/component"])
async def test_a_pod_that_lost_a_label_gets_it_back(world: World, label: str) -> None:
    """Else its name is taken, nobody sees who has it, and the pool stays short for ever."""
    pod = sorted(world.pods("chat-decode"))[0]
    world.edit(PODS, pod, lambda b: b["metadata"]["labels"].pop(label))
    await world.settle()
    assert world.body(PODS, pod)["metadata"]["labels"][label]
    assert len(world.pods("chat-decode")) == 2
    assert world.condition("DecodeAvailable").sentence == "2/2 pods are Ready"


async def test_a_recorded_template_that_lost_its_labels_gets_them_back(world: World) -> None:
    revision = next(iter(world.pods("chat-decode").values()))
    world.edit(REVISIONS, f"chat-decode-{revision}", lambda b: b["metadata"].update(labels={}))
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.settle()
    assert len(world.pods("chat-decode")) == 2


async def test_a_pod_with_our_labels_that_is_not_ours_is_left_alone(world: World) -> None:
    pod = sorted(world.pods("chat-decode"))[0]
    meta = world.body(PODS, pod)["metadata"]
    owner = {"kind": "ReplicaSet", "uid": "uid-rs", "name": "rs", "controller": True}
    for name, owners in (("stray-0", []), ("stray-1", [owner])):
        stray = {"name": name, "namespace": NAMESPACE, "labels": meta["labels"]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": stray, "spec": {}}
        world.kube.user_write(body)
        world.make_ready(name)
        world.body(PODS, name)["metadata"]["ownerReferences"] = owners
        await world.reconciler.reconcile(world.keys()[-1])
        assert world.ended == []
        assert "annotations" not in world.body(PODS, name)["metadata"]


async def test_a_predecessors_pod_on_a_lost_node_does_not_hold_a_fleet_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays Terminating until somebody removes the node, and answers nobody."""
    lost = sorted(world.pods("chat-decode"))[0]
    world.running[lost] = 1
    host = world.body(PODS, lost)["status"]["podIP"]
    world.body(PODS, lost)["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    original = world.drain

    async def drain(to: str, uid: str, request: Any) -> Any:
        if to == host:
            raise OSError("no route to host")
        return await original(to, uid, request)

    monkeypatch.setattr(world, "drain", drain)
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "chat"))
    world.kube.user_write(fleet_body())
    for _ in range(20):
        await world.reconcile()
        world.kubelet()
    assert lost in world.pods("chat-decode", terminating=True)
    await world.reconciler.reconcile(Key("InferenceFleet", NAMESPACE, "chat"))
    assert world.condition("Ready").status == "True"


async def test_a_recorded_template_that_is_not_ours_changes_nothing(world: World) -> None:
    revision = next(iter(world.pods("chat-decode").values()))
    labels = world.body(REVISIONS, f"chat-decode-{revision}")["metadata"]["labels"]
    meta = {"name": "stray", "namespace": NAMESPACE, "labels": labels}
    head = {"apiVersion": "apps/v1", "kind": "ControllerRevision"}
    world.kube.user_write({**head, "metadata": meta, "revision": 1, "data": {}})
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(modelRef={"name": "nope"}))
    await world.settle()
    assert world.condition("Ready")[:2] == ("False", "ModelNotFound")


@pytest.mark.parametrize("since", [None, "yesterday"])
async def test_a_drain_mark_of_somebody_else_does_not_cut_streams_off(
    world: World, since: str | None
) -> None:
    world.clock.sleep(100_000.0)
    pod = sorted(world.pods("chat-decode"))[1]
    world.running[pod] = 3
    marks = {"tandem.dev/draining": "maintenance"}
    marks |= {"tandem.dev/draining-since": since} if since else {}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=1))
    world.edit(PODS, pod, lambda b: b["metadata"]["annotations"].update(marks))
    for _ in range(5):
        await world.reconcile()
        world.clock.sleep(1.0)
    assert pod in world.pods("chat-decode")
    assert pod in world.draining
    world.clock.sleep(600.0)
    await world.reconcile()
    assert pod not in world.pods("chat-decode"), "the drain timeout counts from the first look"


async def test_an_old_pod_that_just_lost_readiness_does_not_halt_a_rollout(world: World) -> None:
    """The progress deadline is about pods that never become Ready."""
    container = {"name": "runtime", "env": [{"name": "V", "value": "2"}]}
    template = {"spec": {"containers": [container]}}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(template=template))
    before = set(world.pods("chat-decode").values())
    for name in world.pods("chat-decode"):
        world.running[name] = 1  # The rollout takes longer than the deadline.
    for _ in range(4):
        await world.reconcile()
        world.kubelet()
    new = next(n for n, r in world.pods("chat-decode").items() if r not in before)
    world.clock.sleep(1801.0)
    lost = {"type": "Ready", "status": "False", "lastTransitionTime": to_text(world.clock())}
    world.body(PODS, new)["status"]["conditions"] = [lost]
    await world.reconcile()
    assert world.condition("Ready")[:2] == ("False", "RollingOut")
    world.clock.sleep(1801.0)
    await world.reconcile()
    assert world.condition("Stalled").reason == "RolloutHalted"
