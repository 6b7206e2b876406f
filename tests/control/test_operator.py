"""The operator as its Deployment on a real control plane: what users do, and what comes of it."""

from __future__ import annotations

import json
import re
import time

import pytest
from fleets import ABSENT, Fleets, eventually, fleet, held, is_ready, model, pool
from tandem.cluster.running import KubectlError, Running

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture
def fleets(cluster: Running, namespace: str) -> Fleets:
    return Fleets(cluster, namespace)


@pytest.fixture
def chat(fleets: Fleets) -> Fleets:
    """A namespace whose fleet `chat` serves with one prefill and two decode stand-ins."""
    fleets.apply(model(), fleet())
    fleets.wait_ready()
    return fleets


def test_a_fleet_comes_to_life_and_kubectl_shows_it(chat: Fleets) -> None:
    table = chat.kubectl("get", "inferencefleets")
    assert re.search(r"NAME +MODEL +READY +PREFILL +DECODE +TTFT +TPOT +AGE", table)
    assert re.search(r"chat +smollm2 +True +1/1 +2/2", table)
    table = chat.kubectl("get", "models")
    assert re.search(r"NAME +SOURCE +ARCHITECTURE +PARAMETERS +READY +AGE", table)
    assert re.search(r"smollm2 +package://\S+ +LlamaForCausalLM +135M +True", table)
    table = chat.kubectl("get", "tandem")
    assert "pool.tandem.dev/chat-decode" in table
    resolved = chat.get("model/smollm2")["status"]["resolved"]
    assert resolved["parameters"] == 134_515_008
    # 30 layers of 3 heads of 64 numbers of 2 bytes, for keys and values.
    assert resolved["kvBytesPerToken"] == 30 * 3 * 64 * 2 * 2
    assert eventually(
        lambda: not chat.get("pods", "-l=app.kubernetes.io/component=resolver")["items"]
    )


def test_pods_are_as_the_design_says(chat: Fleets) -> None:
    uids = {p["metadata"]["name"]: p["metadata"]["uid"] for p in chat.get("pools")["items"]}
    for pod in chat.pods():
        labels, spec = pod["metadata"]["labels"], pod["spec"]
        (owner,) = pod["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["controller"]) == ("Pool", True)
        assert owner["uid"] == uids[labels["tandem.dev/pool"]]
        assert spec["automountServiceAccountToken"] is False
        assert spec["terminationGracePeriodSeconds"] == 630
        assert spec["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == "1"
        keys = {tuple(c["matchLabelKeys"]) for c in spec["topologySpreadConstraints"]}
        assert keys == {("tandem.dev/revision",)}
    assert len(chat.revisions()) == 1


def test_scale_works_on_a_pool_that_nobody_fixes(fleets: Fleets) -> None:
    fleets.apply(model(), fleet(decode=pool(None)))
    fleets.wait_ready()
    assert len(fleets.pods("chat-decode")) == 1
    before = fleets.get("inferencefleet/chat")["status"]["conditions"]
    fleets.kubectl("scale", "pool", "chat-decode", "--replicas=3")
    eventually(lambda: len(fleets.ready("chat-decode")) == 3)
    eventually(lambda: "3/3" in fleets.kubectl("get", "inferencefleet", "chat"))
    # Growing is no fault: neither Ready nor Reconciling moved.
    after = fleets.get("inferencefleet/chat")["status"]["conditions"]
    ready = [[c for c in found if c["type"] == "Ready"] for found in (before, after)]
    assert ready[0] == ready[1]
    fleets.kubectl("scale", "pool", "chat-decode", "--replicas=0")
    eventually(lambda: not fleets.pods("chat-decode"))
    fleets.wait_condition("Ready", "True", "ScaledToZero")
    eventually(lambda: fleets.get("pool/chat-decode")["status"]["replicas"] == 0)


def test_a_size_that_the_fleet_fixes_is_put_back_with_an_event(chat: Fleets) -> None:
    chat.kubectl("scale", "pool", "chat-decode", "--replicas=5")
    eventually(lambda: chat.get("pool/chat-decode")["spec"]["replicas"] == 2)
    (event,) = eventually(lambda: chat.events("ReplicasOverwritten"))
    assert event["type"] == "Warning"
    assert "spec.decode.replicas of InferenceFleet chat" in event["note"]
    assert event["regarding"]["name"] == "chat"


def test_a_deleted_pod_is_replaced_at_once(chat: Fleets) -> None:
    victim = sorted(chat.names("chat-decode"))[0]
    chat.pretend_running(victim, 1)
    chat.kubectl("delete", "pod", victim, "--wait=false")
    eventually(lambda: len(chat.names("chat-decode")) == 2)
    assert victim not in chat.names("chat-decode")
    assert chat.find(f"pod/{victim}"), "a pod with a stream was killed"
    chat.pretend_running(victim, 0)
    eventually(lambda: not chat.find(f"pod/{victim}"))


def test_an_edited_template_rolls_without_losing_capacity(chat: Fleets) -> None:
    (before,) = chat.revisions()
    chat.roll("2")
    seen: set[frozenset[str]] = set()
    while chat.condition("Ready").status != "True":
        decode = chat.pods("chat-decode")
        serving = [p for p in decode if is_ready(p)]
        assert len(serving) >= 2, "fewer decode pods than asked for"
        assert len(decode) <= 3, "more than maxSurge"
        assert len(chat.pods("chat-prefill")) <= 2
        seen.add(frozenset(p["metadata"]["labels"]["tandem.dev/revision"] for p in decode))
        time.sleep(0.2)
    (after,) = chat.revisions()
    assert after != before
    assert frozenset({before, after}) in seen
    assert chat.condition("Reconciling") == ABSENT


def test_a_revision_that_comes_back_is_the_newest(chat: Fleets) -> None:
    """A ControllerRevision whose bytes the server re-encodes can never be patched."""
    (first,) = chat.revisions()
    chat.roll("2")
    chat.wait_ready()
    chat.roll("1")
    chat.wait_ready()
    items = chat.get("controllerrevisions", "--selector=tandem.dev/pool=chat-decode")["items"]
    numbers = {r["metadata"]["labels"]["tandem.dev/revision"]: r["revision"] for r in items}
    assert numbers[first] == max(numbers.values()) == 3


def test_a_pod_that_is_scaled_in_finishes_its_streams(chat: Fleets) -> None:
    first, second = sorted(chat.names("chat-decode"))
    chat.pretend_running(first, 1)
    chat.pretend_running(second, 2)
    chat.edit("inferencefleet/chat", {"spec": {"decode": {"replicas": 1}}})
    eventually(lambda: chat.state(first)["draining"])
    annotations = chat.get(f"pod/{first}")["metadata"]["annotations"]
    assert annotations["tandem.dev/draining"] == "ScaleIn"
    time.sleep(3)
    assert is_ready(chat.get(f"pod/{first}")), "it left with a stream in it"
    assert chat.state(second)["draining"] is False
    chat.pretend_running(first, 0)
    eventually(lambda: not chat.find(f"pod/{first}"))
    assert chat.names("chat-decode") == {second}
    chat.pretend_running(second, 0)


def test_a_deleted_namespace_goes_without_a_complaint(chat: Fleets) -> None:
    """Nothing is made in it any more, and that is no failure."""
    chat.kubectl("delete", "namespace", chat.namespace, "--wait=false")
    eventually(lambda: not held(chat.cluster, chat.namespace), timeout_s=120)
    log = chat.kubectl("logs", "-n", "tandem-system", "deployment/tandem-operator", "--tail=-1")
    said = [line for line in log.splitlines() if chat.namespace in line]
    assert said
    assert not [line for line in said if "is being terminated" in line]


def test_a_bad_revision_halts_and_is_undone(chat: Fleets) -> None:
    (good,) = chat.revisions()
    before = chat.names()
    chat.roll("2", STANDIN_FAIL="the weights of tomorrow are missing")
    said = chat.wait_condition("Stalled", "True", "RolloutHalted")
    assert "the weights of tomorrow are missing" in said.sentence
    assert f"revision {good} serves on" in said.sentence
    assert chat.condition("Ready").status == "False"
    assert chat.condition("DecodeAvailable").status == "True"
    assert before <= chat.names()

    lost = sorted(n for n in chat.names("chat-decode") if good in n)[0]
    chat.kubectl("delete", "pod", lost, "--grace-period=0", "--force")
    eventually(lambda: len([n for n in chat.ready("chat-decode") if good in n]) == 2)

    assert "instead of" in chat.tandem("rollout", "undo", "fleet/chat")
    chat.wait_condition("RolledBack", "True")
    chat.wait_ready()
    assert chat.revisions() == {good}
    history = chat.tandem("rollout", "history", "fleet/chat")
    assert good in history
    chat.roll("3")
    eventually(lambda: chat.condition("RolledBack") == ABSENT and chat.condition("Ready") != ABSENT)
    chat.wait_ready()
    assert good not in chat.revisions()


def test_an_image_that_does_not_exist_halts_in_the_kubelets_words(chat: Fleets) -> None:
    image = {"name": "runtime", "image": "registry.example/nothing:1"}
    spec = {"decode": {"template": {"spec": {"containers": [image]}}}}
    chat.edit("inferencefleet/chat", {"spec": spec})
    said = chat.wait_condition("Stalled", "True", "RolloutHalted")
    assert "ErrImagePull" in said.sentence or "ImagePullBackOff" in said.sentence
    assert len(chat.ready("chat-decode")) == 2


def test_a_template_that_the_api_server_refuses_is_quoted(chat: Fleets) -> None:
    before = chat.names()
    limits = {"resources": {"limits": {"memory": "12 gigs"}}}
    spec = {"decode": {"template": {"spec": {"containers": [{"name": "runtime", **limits}]}}}}
    chat.edit("inferencefleet/chat", {"spec": spec})
    said = chat.wait_condition("TemplateValid", "False", "TemplateRefused")
    assert "quantities must match the regular expression" in said.sentence
    assert said.sentence.startswith("chat-decode: ")
    typo = {"decode": {"template": {"spec": {"nodeSelektor": {"a": "b"}, "containers": None}}}}
    chat.edit("inferencefleet/chat", {"spec": typo})
    eventually(lambda: "nodeSelektor" in chat.condition("TemplateValid").sentence)
    assert chat.condition("Stalled").reason == "TemplateRefused"
    assert chat.names() == before


def test_an_unknown_model_is_said_within_five_seconds(fleets: Fleets) -> None:
    fleets.apply(model("other"), fleet(modelRef={"name": "nope"}))
    said = fleets.wait_condition("ModelResolved", "False", "ModelNotFound")
    assert "Model nope does not exist" in said.sentence
    assert "there are: other" in said.sentence
    assert fleets.condition("Stalled").reason == "ModelNotFound"


def test_the_older_fleet_keeps_the_name(chat: Fleets) -> None:
    time.sleep(1.1)  # Ages are in whole seconds.
    chat.apply(fleet("younger", decode=pool(1)))
    said = chat.wait_condition(
        "NamesServed", "False", "NameConflict", what="inferencefleet/younger"
    )
    assert "an older fleet already serves smollm2 (InferenceFleet chat)" in said.sentence
    assert chat.condition("Ready").status == "True"
    chat.wait_condition("Ready", "False", "NameConflict", what="inferencefleet/younger")
    chat.kubectl("delete", "inferencefleet", "chat")
    chat.wait_ready("younger")


def test_an_eviction_is_refused_while_the_pod_serves(chat: Fleets) -> None:
    eventually(lambda: chat.get("pdb/chat-decode").get("status", {}).get("expectedPods") == 2)
    pod = sorted(chat.names("chat-decode"))[0]
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": chat.namespace},
    }
    path = f"/api/v1/namespaces/{chat.namespace}/pods/{pod}/eviction"
    with pytest.raises(KubectlError, match="violate the pod's disruption budget"):
        chat.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))
    assert pod in chat.names("chat-decode")


def test_a_node_that_is_drained_is_left_for_others_first(chat: Fleets) -> None:
    """`kubectl drain` is refused and asks again until a replacement serves elsewhere."""
    eventually(lambda: chat.get("pdb/chat-decode").get("status", {}).get("expectedPods") == 2)
    node = node_of(chat, sorted(chat.names("chat-decode"))[0])
    try:
        chat.kubectl("drain", node, "--pod-selector=tandem.dev/pool=chat-decode", "--force",
                     "--timeout=90s", "--disable-eviction=false")  # fmt: skip
        serving = chat.ready("chat-decode")
        assert len(serving) == 2, "the replacement was there before the pod went"
        assert node not in {node_of(chat, pod) for pod in serving}
    finally:
        chat.kubectl("uncordon", node)
    chat.wait_ready()


def test_a_deleted_fleet_gives_streams_a_while_and_leaves_nothing(chat: Fleets) -> None:
    busy = sorted(chat.names("chat-decode"))[0]
    chat.pretend_running(busy, 1)
    chat.kubectl("delete", "inferencefleet", "chat")
    eventually(lambda: chat.state(busy)["draining"])
    assert eventually(lambda: chat.pods("chat-decode", terminating=True) and busy)
    started_s = time.monotonic()
    eventually(lambda: not chat.pods(terminating=True), timeout_s=120)
    assert time.monotonic() - started_s < 90, "running streams get 30 s, the grace period is longer"
    for what in ("pools", "controllerrevisions", "pdb", "deployments", "services", "rolebindings"):
        eventually(lambda what=what: not chat.get(what)["items"])
    eventually(lambda: not chat.find("secret/tandem-handoff"))
    eventually(lambda: not chat.find("serviceaccount/tandem-gateway"))


def test_served_names_change_without_a_rollout(chat: Fleets) -> None:
    before = chat.names()
    chat.edit("model/smollm2", {"spec": {"servedNames": ["chat-small", "smollm2"]}})
    key = "tandem.dev/served-names"
    eventually(
        lambda: {p["metadata"]["annotations"][key] for p in chat.pods()} == {"chat-small,smollm2"}
    )
    assert chat.names() == before
    assert chat.get("inferencefleet/chat")["status"]["servedNames"] == ["chat-small", "smollm2"]


def node_of(fleets: Fleets, pod: str) -> str:
    name: str = fleets.get(f"pod/{pod}")["spec"]["nodeName"]
    return name
