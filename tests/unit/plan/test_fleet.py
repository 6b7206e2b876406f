"""A fleet's plan in a whole loop: what the user does, and what the cluster looks like then."""

from __future__ import annotations

from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import ABSENT, World
from tandem_operator.kube.client import ApiError
from tandem_operator.resources import (
    BUDGETS,
    FLEETS,
    MODELS,
    NODES,
    PODS,
    POOLS,
    REVISIONS,
    Ref,
)

Body = dict[str, Any]


def template(value: str) -> Body:
    """A partial template that makes another revision."""
    container = {"name": "runtime", "env": [{"name": "V", "value": value}]}
    return {"spec": {"containers": [container]}}


def set_template(body: Body, value: str) -> None:
    for role in ("prefill", "decode"):
        if role in body["spec"]:
            body["spec"][role]["template"] = template(value)


@pytest.fixture
async def world() -> World:
    """A fleet that serves."""
    world = World()
    world.kube.user_write(model_body())
    world.kube.user_write(fleet_body())
    await world.settle()
    return world


async def test_a_new_fleet_serves(world: World) -> None:
    assert len(world.pods("chat-prefill")) == 1
    assert len(world.pods("chat-decode")) == 2
    assert world.condition("Ready")[:2] == ("True", "Serving")
    assert world.condition("Reconciling") == ABSENT
    assert world.condition("Stalled") == ABSENT
    status = world.body(FLEETS, "chat")["status"]
    assert (status["prefill"]["ready"], status["decode"]["ready"]) == ("1/1", "2/2")
    assert status["servedNames"] == ["smollm2"]
    assert status["url"] == "http://tandem-gateway.team.svc"


async def test_a_second_reconcile_writes_nothing(world: World) -> None:
    assert await world.reconcile() == 0
    world.clock.sleep(10_000.0)
    assert await world.reconcile() == 0
    world.restart()
    # The handoff secret cannot be read, so a new process asks once whether it is there.
    assert await world.reconcile() == 0


async def test_a_fleet_waits_for_its_model() -> None:
    world = World()
    world.kube.user_write(fleet_body())
    await world.settle()
    assert world.condition("ModelResolved") == (
        "False",
        "ModelNotFound",
        "Model smollm2 does not exist in namespace team (there are: none); create it or change "
        "spec.modelRef",
    )
    assert world.condition("Ready")[:2] == ("False", "ModelNotFound")
    assert not world.kube.pods(NAMESPACE)
    world.kube.user_write(model_body())
    await world.settle()
    assert world.condition("Ready").status == "True"


async def test_an_edit_rolls_every_pod_and_keeps_the_revision_in_step(world: World) -> None:
    before = set(world.pods("chat-decode").values())
    world.edit(FLEETS, "chat", lambda b: set_template(b, "2"))
    await world.reconcile()
    assert world.condition("Ready")[:2] == ("False", "RollingOut")
    assert world.condition("Reconciling").status == "True"
    await world.settle()
    after = set(world.pods("chat-decode").values())
    assert after == set(world.pods("chat-prefill").values())
    assert not after & before
    assert world.condition("Ready").status == "True"
    status = world.body(FLEETS, "chat")["status"]
    assert {status["revision"][key] for key in ("target", "serving", "spec")} == after


async def test_what_is_not_in_the_pods_is_no_new_revision(world: World) -> None:
    before = world.pods("chat-decode")

    def edit(body: Body) -> None:
        body["spec"]["decode"]["replicas"] = 3
        body["spec"]["rollout"] = {**body["spec"]["rollout"], "maxSurge": 2}
        body["spec"]["disruption"] = {"maxUnavailable": 1, "drainTimeoutSeconds": 60}
        body["spec"]["objectives"] = {"timeToFirstToken": {"targetMilliseconds": 500}}

    world.edit(FLEETS, "chat", edit)
    await world.settle()
    assert before.items() <= world.pods("chat-decode").items()
    assert len(world.pods("chat-decode")) == 3
    assert world.body(BUDGETS, "chat-decode")["spec"]["maxUnavailable"] == 1
    grace = {pod["spec"]["terminationGracePeriodSeconds"] for pod in world.kube.pods(NAMESPACE)}
    assert grace == {630, 90}


async def test_served_names_change_in_place(world: World) -> None:
    before = world.pods("chat-decode")
    world.edit(MODELS, "smollm2", lambda b: b["spec"].update(servedNames=["a", "b"]))
    await world.settle()
    assert world.pods("chat-decode") == before
    for pod in before:
        annotations = world.body(PODS, pod)["metadata"]["annotations"]
        assert annotations["tandem.dev/served-names"] == "a,b"
    assert world.body(FLEETS, "chat")["status"]["servedNames"] == ["a", "b"]


async def test_the_older_fleet_keeps_a_name(world: World) -> None:
    world.clock.sleep(5.0)
    world.kube.user_write(fleet_body("younger", prefill=None, decode={"replicas": 1}))
    await world.settle()
    status, reason, sentence = world.condition("Ready", "younger")
    assert (status, reason) == ("False", "NameConflict")
    assert sentence == (
        "an older fleet already serves smollm2 (InferenceFleet chat); give Model smollm2 other "
        "servedNames, or delete one of the fleets"
    )
    assert world.condition("Ready").status == "True"
    for pod in world.pods("younger-decode"):
        assert world.body(PODS, pod)["metadata"]["annotations"]["tandem.dev/served-names"] == ""
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "chat"))
    await world.settle()
    assert world.condition("Ready", "younger").status == "True"


async def test_a_lost_pod_is_replaced_at_once_under_another_name(world: World) -> None:
    victim = sorted(world.pods("chat-decode"))[0]
    world.running[victim] = 1  # It takes its time to end.
    await world.kube.delete(Ref(PODS, NAMESPACE, victim))
    await world.reconcile()
    now = world.pods("chat-decode")
    assert len(now) == 2
    assert victim not in now
    assert victim in world.pods("chat-decode", terminating=True)


async def test_scale_in_drains_the_pod_with_the_least_to_lose(world: World) -> None:
    first, second = sorted(world.pods("chat-decode"))
    world.running |= {first: 1, second: 3}
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=1))
    await world.reconcile()
    await world.reconcile()
    assert world.draining == {first}
    annotations = world.body(PODS, first)["metadata"]["annotations"]
    assert annotations["tandem.dev/draining"] == "ScaleIn"
    await world.settle()
    assert first in world.pods("chat-decode"), "a pod with streams was deleted"
    assert world.condition("Ready").status == "True"
    world.running[first] = 0
    await world.settle()
    assert list(world.pods("chat-decode")) == [second]


async def test_a_drain_ends_with_its_timeout(world: World) -> None:
    world.running |= dict.fromkeys(world.pods("chat-decode"), 5)
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=1))
    await world.reconcile()
    await world.reconcile()
    leaving = next(iter(world.draining))
    world.clock.sleep(599.0)
    await world.reconcile()
    assert leaving in world.pods("chat-decode")
    world.clock.sleep(2.0)
    await world.reconcile()
    assert leaving not in world.pods("chat-decode")


async def test_a_scale_out_takes_a_draining_pod_back(world: World) -> None:
    before = world.pods("chat-decode")
    world.running |= dict.fromkeys(before, 1)
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=1))
    await world.settle()
    assert len(world.draining) == 1
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=2))
    await world.settle()
    assert world.draining == set()
    assert world.pods("chat-decode") == before
    for pod in before:
        assert "tandem.dev/draining" not in world.body(PODS, pod)["metadata"]["annotations"]


async def test_somebody_elses_size_is_put_back_and_told(world: World) -> None:
    await world.kube.scale(Ref(POOLS, NAMESPACE, "chat-decode"), 5, manager="kubectl")
    world.events.clear()
    await world.settle()
    assert world.body(POOLS, "chat-decode")["spec"]["replicas"] == 2
    assert len(world.pods("chat-decode")) == 2
    told = [e for e in world.events if e.reason == "ReplicasOverwritten"]
    assert [e.type for e in told] == ["Warning"]
    assert "spec.decode.replicas of InferenceFleet chat" in told[0].note


async def test_without_replicas_the_pool_keeps_whoever_writes_it(world: World) -> None:
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].pop("replicas"))
    await world.settle()
    assert len(world.pods("chat-decode")) == 2, "a change of mode changed the size"
    await world.kube.scale(Ref(POOLS, NAMESPACE, "chat-decode"), 4, manager="kubectl")
    await world.settle()
    assert len(world.pods("chat-decode")) == 4
    assert world.condition("Ready").status == "True"


async def test_scaled_to_zero_on_purpose_is_ready(world: World) -> None:
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].pop("replicas"))
    await world.settle()
    await world.kube.scale(Ref(POOLS, NAMESPACE, "chat-decode"), 0, manager="kubectl")
    await world.settle()
    assert world.pods("chat-decode") == {}
    assert world.condition("Ready")[:2] == ("True", "ScaledToZero")


async def test_growing_changes_neither_ready_nor_reconciling(world: World) -> None:
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(replicas=5))
    await world.reconcile()
    await world.reconcile()
    assert world.body(FLEETS, "chat")["status"]["decode"]["ready"] == "2/5"
    assert world.condition("Ready").status == "True"
    assert world.condition("Reconciling") == ABSENT


async def test_losing_a_pod_makes_the_fleet_not_ready_until_it_is_back(world: World) -> None:
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.reconcile()
    assert world.condition("Ready")[:2] == ("False", "PodsNotReady")
    await world.settle()
    assert world.condition("Ready").status == "True"


async def test_a_bad_revision_halts_with_the_old_one_serving(world: World) -> None:
    before = world.pods("chat-decode") | world.pods("chat-prefill")
    good = set(before.values())
    world.edit(FLEETS, "chat", lambda b: set_template(b, "BAD"))
    await world.settle()
    assert before.items() <= (world.pods("chat-decode") | world.pods("chat-prefill")).items()
    status, reason, sentence = world.condition("Stalled")
    assert (status, reason) == ("True", "RolloutHalted")
    assert f"revision {next(iter(good))} serves on" in sentence
    assert "the flag --nonsense does not exist" in sentence
    assert world.condition("DecodeAvailable").status == "True"
    world.lose(sorted(world.pods("chat-decode"))[0])
    await world.settle()
    ready = [r for r in world.pods("chat-decode").values() if r in good]
    assert len(ready) == 2, "the lost pod did not come back in the serving revision"


async def test_undo_serves_the_old_revision_and_says_so(world: World) -> None:
    good = world.body(FLEETS, "chat")["status"]["revision"]["target"]
    world.edit(FLEETS, "chat", lambda b: set_template(b, "BAD"))
    await world.settle()
    bad = world.body(FLEETS, "chat")["status"]["revision"]["spec"]
    note = f'{{"from": "{bad}", "to": "{good}"}}'

    def undo(body: Body) -> None:
        body["metadata"]["annotations"] = {"tandem.dev/rollback": note}

    world.edit(FLEETS, "chat", undo)
    await world.settle()
    assert set(world.pods("chat-decode").values()) == {good}
    assert world.condition("RolledBack").status == "True"
    assert world.condition("Ready").status == "True"
    world.edit(FLEETS, "chat", lambda b: set_template(b, "3"))
    await world.settle()
    assert world.condition("RolledBack") == ABSENT
    assert good not in world.pods("chat-decode").values()


async def test_undo_to_a_revision_that_is_gone_says_so(world: World) -> None:
    now = world.body(FLEETS, "chat")["status"]["revision"]["target"]

    def undo(body: Body) -> None:
        note = f'{{"from": "{now}", "to": "nowhere"}}'
        body["metadata"]["annotations"] = {"tandem.dev/rollback": note}

    world.edit(FLEETS, "chat", undo)
    await world.settle()
    status, reason, _ = world.condition("RolledBack")
    assert (status, reason) == ("False", "RollbackRevisionGone")
    assert len(world.pods("chat-decode")) == 2


async def test_a_refused_template_changes_nothing(world: World) -> None:
    before = world.pods("chat-decode")
    sentence = "spec.containers[0].image: Required value"
    world.kube.refuse = {"chat-decode-": ApiError(422, "Invalid", sentence)}
    world.edit(FLEETS, "chat", lambda b: set_template(b, "2"))
    await world.settle()
    assert world.pods("chat-decode") == before
    assert world.condition("TemplateValid") == (
        "False",
        "TemplateRefused",
        f"chat-decode: {sentence}",
    )
    assert world.condition("Stalled").reason == "TemplateRefused"
    assert world.condition("Ready").status == "False"
    world.kube.refuse = {}
    world.clock.sleep(300.0)
    await world.settle()
    assert world.condition("TemplateValid").status == "True"
    assert not set(before) & set(world.pods("chat-decode"))


async def test_accelerators_that_cannot_share_the_model_stall_the_fleet(world: World) -> None:
    before = world.pods("chat-decode")

    def edit(body: Body) -> None:
        body["spec"]["decode"]["accelerator"] = {"resource": "nvidia.com/gpu", "count": 2}

    world.edit(FLEETS, "chat", edit)
    await world.settle()
    assert world.pods("chat-decode") == before
    status, reason, sentence = world.condition("Stalled")
    assert (status, reason) == ("True", "TemplateRefused")
    assert sentence.endswith("evenly (tensor parallel); use 1, 3")


async def test_a_template_that_sets_what_is_ours_is_refused(world: World) -> None:
    def edit(body: Body) -> None:
        labels = {"metadata": {"labels": {"tandem.dev/role": "decode"}}}
        body["spec"]["prefill"]["template"] = labels

    world.edit(FLEETS, "chat", edit)
    await world.settle()
    assert world.condition("TemplateValid").sentence == (
        "prefill.template.metadata.labels sets tandem.dev/role, which belongs to Tandem: remove it"
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"metadata": "x"},
        {"spec": {"containers": [{"resources": {"limits": {"cpu": "1"}}}]}},
        {"spec": {"containers": None}},
    ],
    ids=["no object", "no name", "null"],
)
async def test_a_template_that_cannot_be_merged_is_told_and_changes_nothing(
    world: World, shape: Body
) -> None:
    before = world.pods("chat-decode")
    world.edit(FLEETS, "chat", lambda b: b["spec"]["decode"].update(template=shape))
    await world.settle()
    assert world.condition("TemplateValid")[:2] == ("False", "TemplateRefused")
    assert "must be" in world.condition("Stalled").sentence
    assert world.pods("chat-decode") == before


async def test_a_deleted_model_leaves_the_running_revision_alone(world: World) -> None:
    before = world.pods("chat-decode")
    world.kube.vanish(Ref(MODELS, NAMESPACE, "smollm2"))
    await world.settle()
    assert world.pods("chat-decode") == before
    assert world.condition("ModelResolved")[:2] == (
        "False",
        "ModelNotFound",
    )
    world.lose(sorted(before)[0])
    await world.settle()
    assert len(world.pods("chat-decode")) == 2


async def test_another_model_that_does_not_exist_blocks_the_fleet(world: World) -> None:
    before = world.pods("chat-decode")
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(modelRef={"name": "nope"}))
    await world.settle()
    assert world.pods("chat-decode") == before
    assert world.condition("Ready")[:2] == ("False", "ModelNotFound")
    assert world.condition("Stalled") != ABSENT


async def test_no_room_waits_with_one_replica_and_says_so(world: World) -> None:
    world.edit(FLEETS, "chat", lambda b: set_template(b, "2"))
    for _ in range(5):
        await world.reconcile()
    starving = [
        pod["metadata"]["name"] for pod in world.kube.pods(NAMESPACE) if "status" not in pod
    ]
    assert len(starving) == 2
    for name in starving:
        world.starve(name)
    world.clock.sleep(30.0)
    for _ in range(5):
        await world.reconcile()
    status, reason, sentence = world.condition("Ready")
    assert (status, reason) == ("False", "InsufficientCapacity")
    assert "Insufficient nvidia.com/gpu" in sentence
    assert world.draining == set()
    await world.settle()
    assert world.condition("Ready").status == "True"


async def test_removing_prefill_ends_its_pool(world: World) -> None:
    world.edit(FLEETS, "chat", lambda b: b["spec"].pop("prefill"))
    await world.settle()
    assert world.pods("chat-prefill") == {}
    assert (POOLS, NAMESPACE, "chat-prefill") not in world.kube.objects
    assert len(world.pods("chat-decode")) == 2
    assert world.body(POOLS, "chat-decode")["spec"]["role"] == "both"
    assert world.condition("Ready").status == "True"
    assert world.condition("PrefillAvailable") == ABSENT
    world.edit(FLEETS, "chat", lambda b: b["spec"].update(prefill={"replicas": 2}))
    await world.settle()
    assert len(world.pods("chat-prefill")) == 2
    assert world.body(POOLS, "chat-decode")["spec"]["role"] == "decode"
    assert world.condition("Ready").status == "True"


async def test_a_deleted_fleet_tells_its_pods_to_end(world: World) -> None:
    pods = [*world.pods("chat-decode"), *world.pods("chat-prefill")]
    world.running |= dict.fromkeys(pods, 1)
    world.kube.vanish(Ref(FLEETS, NAMESPACE, "chat"))
    await world.reconcile()
    assert sorted(world.ended) == sorted(pods)
    await world.reconcile()
    assert len(world.ended) == len(pods), "told twice"
    world.running.clear()
    await world.settle()
    assert not world.kube.pods(NAMESPACE)


async def test_a_deleted_pool_comes_back(world: World) -> None:
    world.kube.vanish(Ref(POOLS, NAMESPACE, "chat-decode"))
    await world.settle()
    assert len(world.pods("chat-decode")) == 2
    assert world.condition("Ready").status == "True"


async def test_only_the_newest_revisions_are_kept(world: World) -> None:
    for value in range(14):
        world.edit(FLEETS, "chat", lambda b, v=value: set_template(b, str(v)))
        await world.settle()
    kept = [b for (kind, _, _), b in world.kube.objects.items() if kind == REVISIONS]
    decode = [b for b in kept if b["metadata"]["name"].startswith("chat-decode")]
    assert len(decode) == 10
    serving = world.body(FLEETS, "chat")["status"]["revision"]["serving"]
    newest = max(decode, key=lambda b: b["revision"])
    assert newest["metadata"]["name"] == f"chat-decode-{serving}"


async def test_failed_pods_are_replaced_and_told(world: World) -> None:
    name = sorted(world.pods("chat-decode"))[0]
    world.clock.sleep(60.0)
    failed = {"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}
    world.body(PODS, name)["status"] = failed
    await world.reconcile()
    assert name not in world.pods("chat-decode")
    assert len(world.pods("chat-decode")) == 2
    told = [e.note for e in world.events if e.reason == "PodFailed"]
    assert told == [f"Pod {name} failed and is replaced: the node was low on memory"]


async def test_pods_that_a_node_refuses_cause_no_storm(world: World) -> None:
    for _ in range(30):
        for pod in list(world.kube.pods(NAMESPACE)):
            if "status" not in pod:
                pod["status"] = {"phase": "Failed", "reason": "OutOfnvidia.com/gpu"}
        if sorted(world.pods("chat-decode")):
            await world.reconcile()
        world.clock.sleep(1.0)
        if _ == 0:
            world.lose(sorted(world.pods("chat-decode"))[0])
    created = [w for w in world.kube.writes if w.startswith("create chat-decode-")]
    assert len(created) < 10


class TestNodeDrains:
    """A node that is to be drained: the replacement first, then the pod."""

    @pytest.fixture
    def tainted(self, world: World) -> str:
        """A decode pod on a node of its own, which `kubectl drain` has just cordoned."""
        name = sorted(world.pods("chat-decode"))[0]
        for number, pod in enumerate(world.kube.pods(NAMESPACE)):
            pod["spec"]["nodeName"] = self.node = f"node-{number}"
            self.taint(world)
        self.node = world.body(PODS, name)["spec"]["nodeName"]
        self.taint(world, "node.kubernetes.io/unschedulable")
        return name

    def taint(self, world: World, *keys: str, effect: str = "NoSchedule") -> None:
        taints = [{"key": key, "effect": effect} for key in keys]
        node = {"metadata": {"name": self.node, "uid": "n"}, "spec": {"taints": taints}}
        world.kube.objects[NODES, "", self.node] = node

    async def test_the_replacement_serves_before_the_pod_drains(
        self, world: World, tainted: str
    ) -> None:
        world.running[tainted] = 1
        await world.reconcile()
        assert len(world.pods("chat-decode")) == 3
        await world.reconcile()
        assert world.draining == set(), "the other one is not Ready yet"
        world.kubelet()
        await world.reconcile()
        assert world.draining == {tainted}
        mark = world.body(PODS, tainted)["metadata"]["annotations"]["tandem.dev/draining"]
        assert mark == "NodeDraining"
        await world.reconcile()
        assert tainted in world.pods("chat-decode"), "it has a stream"
        world.running.clear()
        await world.settle()
        assert tainted not in world.pods("chat-decode")
        assert len(world.pods("chat-decode")) == 2
        assert world.condition("Ready")[:2] == ("True", "Serving")
        assert await world.reconcile() == 0

    async def test_the_size_of_the_pool_never_changes(self, world: World, tainted: str) -> None:
        """The budget counts from it: with one pod more, one eviction is allowed."""
        await world.reconcile()
        assert world.body(POOLS, "chat-decode")["spec"]["replicas"] == 2
        assert world.body(BUDGETS, "chat-decode")["spec"]["maxUnavailable"] == 0

    async def test_the_taint_goes_before_the_replacement_serves(
        self, world: World, tainted: str
    ) -> None:
        await world.reconcile()
        self.taint(world)
        await world.settle()
        assert tainted in world.pods("chat-decode")
        assert len(world.pods("chat-decode")) == 2
        assert world.draining == set()

    async def test_the_taint_goes_once_the_pod_drains(self, world: World, tainted: str) -> None:
        """Another serves by now, so the drain goes on."""
        world.running[tainted] = 1
        await world.reconcile()
        world.kubelet()
        await world.reconcile()
        self.taint(world)
        world.running.clear()
        await world.settle()
        assert len(world.pods("chat-decode")) == 2

    async def test_a_pod_that_tolerates_the_taint_stays(self, world: World, tainted: str) -> None:
        """Its replacement might come to the same node, and so on for ever."""
        for toleration in (
            {"key": "node.kubernetes.io/unschedulable", "operator": "Exists"},
            {"operator": "Exists"},
        ):
            world.body(PODS, tainted)["spec"]["tolerations"] = [toleration]
            assert await world.reconcile() == 0

    async def test_other_taints_are_nobody_s_business(self, world: World, tainted: str) -> None:
        self.taint(world, "nvidia.com/gpu", "node.kubernetes.io/memory-pressure")
        assert await world.reconcile() == 0
        self.taint(world, "karpenter.sh/disrupted", effect="PreferNoSchedule")
        assert await world.reconcile() == 0, "pods still come to this node"
