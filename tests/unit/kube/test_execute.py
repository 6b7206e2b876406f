"""Actions carried out: what counts as done, what fails, what is skipped."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from fake_kube import Clock, FakeKube
from tandem_operator.kube.client import ApiError
from tandem_operator.kube.execute import Executor, Outcome
from tandem_operator.names import Reason
from tandem_operator.plan.actions import (
    Action,
    Annotate,
    CheckTemplate,
    Create,
    CreateSecret,
    Delete,
    Evict,
    Notify,
    PatchNode,
    Plan,
    PostDrain,
)
from tandem_operator.resources import NODES, PODS, SECRETS, Ref
from tandem_runtime.protocol import DrainRequest, PodState


class Pods:
    """Drain hooks that do not answer."""

    async def drain(self, host: str, uid: str, request: DrainRequest) -> PodState:
        raise OSError(f"{host} refused")


class Silence:
    async def record(self, event: Notify) -> None:
        return None


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube(Clock())


async def execute(kube: FakeKube, *actions: Action) -> list[Outcome]:
    executor = Executor(kube, Pods(), Silence(), lambda n: b"\x01" * n)
    return await executor.execute(Plan(actions))


def pod(name: str = "p", owner: str = "owner-1") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "team",
            "ownerReferences": [{"uid": owner, "controller": True}],
        },
        "spec": {},
    }


def create(owner: str = "owner-1") -> Create:
    return Create(pod(owner=owner), Reason.SCALE_OUT, owner)


def ref(kube: FakeKube) -> Ref:
    uid = kube.objects[PODS, "team", "p"]["metadata"]["uid"]
    return Ref(PODS, "team", "p", uid)


async def test_making_the_same_thing_twice_is_success(kube: FakeKube) -> None:
    outcomes = await execute(kube, create(), create())
    assert [o.error for o in outcomes] == [None, None]


async def test_a_name_that_somebody_else_has_is_a_failure(kube: FakeKube) -> None:
    await execute(kube, create("owner-2"))
    (outcome,) = await execute(kube, create())
    assert outcome.error == "Pod p exists and belongs to somebody else"


async def test_a_name_that_is_being_freed_is_tried_again(kube: FakeKube) -> None:
    await execute(kube, create())
    await kube.delete(ref(kube))
    (outcome,) = await execute(kube, create())
    assert outcome.error == "Pod p is being deleted; trying again"


async def test_deleting_what_is_gone_is_success(kube: FakeKube) -> None:
    (outcome,) = await execute(kube, Delete(Ref(PODS, "team", "p", "u"), Reason.DRAINED))
    assert outcome.error is None


async def test_a_successor_of_the_same_name_is_not_touched(kube: FakeKube) -> None:
    await execute(kube, create())
    old = Ref(PODS, "team", "p", "an older uid")
    outcomes = await execute(
        kube, Delete(old, Reason.DRAINED), Annotate(old, {"a": "b"}, Reason.SCALE_IN)
    )
    assert [o.error for o in outcomes] == [None, None]
    body = kube.objects[PODS, "team", "p"]
    assert "deletionTimestamp" not in body["metadata"]
    assert "annotations" not in body["metadata"]


async def test_what_follows_a_failure_on_the_same_object_is_skipped(kube: FakeKube) -> None:
    await execute(kube, create())
    target = ref(kube)
    outcomes = await execute(
        kube,
        PostDrain(target, "127.0.0.1", DrainRequest("end"), Reason.POOL_DELETED),
        Annotate(target, {"told": "yes"}, Reason.POOL_DELETED),
        Create(pod("q"), Reason.SCALE_OUT, "owner-1"),
    )
    assert [o.error for o in outcomes] == ["OSError: 127.0.0.1 refused", None]
    assert "annotations" not in kube.objects[PODS, "team", "p"]["metadata"]
    assert (PODS, "team", "q") in kube.objects


async def test_a_secret_is_random_and_its_presence_is_success(kube: FakeKube) -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": "team"},
    }
    action = CreateSecret(manifest, "key", Reason.CONFIGURED)
    outcomes = await execute(kube, action, action)
    assert [o.error for o in outcomes] == [None, None]
    data = kube.objects[SECRETS, "team", "s"]["data"]["key"]
    assert base64.b64decode(data) == b"\x01" * 32
    assert "data" not in manifest


@pytest.mark.parametrize(
    ("status", "sentence", "reason"),
    [
        (422, "spec.containers: Required value", Reason.TEMPLATE_REFUSED),
        (400, 'unknown field "spec.nodeSelektor"', Reason.TEMPLATE_REFUSED),
        (403, "violates PodSecurity", Reason.TEMPLATE_REFUSED),
        (403, "exceeded quota: gpus", Reason.QUOTA_EXCEEDED),
    ],
)
async def test_a_refused_template_is_an_answer(
    kube: FakeKube, status: int, sentence: str, reason: Reason
) -> None:
    kube.refuse = {"p": ApiError(status, "", sentence)}
    (outcome,) = await execute(kube, CheckTemplate("p-r", pod(), Reason.CONFIGURED))
    assert outcome.error is None
    assert outcome.check is not None
    assert (outcome.check.accepted, outcome.check.reason) == (False, reason)
    assert outcome.check.sentence == sentence
    assert not kube.objects


async def test_an_api_server_that_is_busy_is_no_answer(kube: FakeKube) -> None:
    kube.refuse = {"p": ApiError(500, "", "etcd is away")}
    (outcome,) = await execute(kube, CheckTemplate("p-r", pod(), Reason.CONFIGURED))
    assert (outcome.check, outcome.error) == (None, "etcd is away")


@pytest.mark.parametrize("first", [create(), CheckTemplate("r1", pod(), Reason.CONFIGURED)])
async def test_a_namespace_that_is_being_deleted_ends_the_plan_without_a_failure(
    kube: FakeKube, first: Action
) -> None:
    sentence = "unable to create new content in namespace team because it is being terminated"
    kube.refuse = {"p": ApiError(403, "Forbidden", sentence, ["NamespaceTerminating"])}
    assert await execute(kube, first, Create(pod("q"), Reason.SCALE_OUT, "owner-1")) == []
    assert (PODS, "team", "q") not in kube.objects


NODE: dict[str, Any] = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}, "spec": {}}


async def test_an_eviction_that_a_budget_forbids_is_an_answer(kube: FakeKube) -> None:
    kube.user_write(pod())
    target = Ref(PODS, "team", "p")
    kube.evictions = {"p": "Cannot evict pod as it would violate the pod's disruption budget."}
    (outcome,) = await execute(kube, Evict(target, Reason.NODE_DRAINING))
    assert outcome.error is None
    assert outcome.refusal == kube.evictions["p"]
    kube.evictions = {}
    (outcome,) = await execute(kube, Evict(target, Reason.NODE_DRAINING))
    assert (outcome.error, outcome.refusal) == (None, None)
    (gone,) = await execute(kube, Evict(Ref(PODS, "team", "q"), Reason.NODE_DRAINING))
    assert (gone.error, gone.refusal) == (None, None), "it is gone, as was wanted"


async def test_a_node_is_written_as_it_was_seen_or_not_at_all(kube: FakeKube) -> None:
    kube.user_write(NODE)
    seen = kube.objects[NODES, "", "n"]["metadata"]["resourceVersion"]
    target = Ref(NODES, "", "n")
    change = {"metadata": {"annotations": {"a": "b"}}, "spec": {"unschedulable": True}}
    (outcome,) = await execute(kube, PatchNode(target, seen, change, Reason.NODE_DRAINING))
    assert outcome.error is None
    assert kube.objects[NODES, "", "n"]["spec"] == {"unschedulable": True}
    undo = {"metadata": {"annotations": {"a": None}}, "spec": {"unschedulable": None}}
    (outcome,) = await execute(kube, PatchNode(target, seen, undo, Reason.NODE_RECOVERED))
    assert outcome.error == "the object has been modified"
    assert kube.objects[NODES, "", "n"]["spec"] == {"unschedulable": True}


async def test_a_forced_deletion_does_not_wait_for_the_node(kube: FakeKube) -> None:
    kube.user_write(pod())
    await execute(kube, Delete(Ref(PODS, "team", "p"), Reason.NODE_DEAD, grace_s=0))
    assert (PODS, "team", "p") not in kube.objects
