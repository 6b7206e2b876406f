"""Failing nodes on a real control plane: agents that die, conditions, people, an operator that is
killed meanwhile. One cluster with short graces, one fleet, one policy that each test sets."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterator

import pytest
from failing_nodes import (
    LIMIT_S,
    OPERATOR,
    QUICK,
    SIGNALS,
    Body,
    a_decode_node,
    allocatable,
    condition,
    decode_on,
    entry,
    eventually,
    free_nodes,
    is_cordoned,
    is_ours,
    no_room_but_on,
    node_body,
    nodes,
    policy,
    reasons_of,
    status,
    wait_forgotten,
    wait_phase,
    with_agent,
)
from fleets import Fleets, fleet, model, pool
from operator_process import OperatorProcess, kubeconfig
from tandem.cluster.process import is_running, send_signal
from tandem.cluster.running import Running
from tandem.cluster.spec import ClusterSpec, NodeTimings
from tandem.cluster.up import install

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[[ClusterSpec], Running]) -> Running:
    """Four nodes; a silent one is noticed after 4 s, and Kubernetes itself evicts nobody."""
    name = f"health-{secrets.token_hex(3)}"
    timings = NodeTimings(grace_s=4.0)
    return start_cluster(ClusterSpec(name=name, operator=False, timings=timings))


@pytest.fixture(scope="module")
def process(
    cluster: Running, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """The operator as a process of its own: no node takes it down."""
    install(cluster, lambda line: None)
    where = ("--namespace=tandem-system", "deployment/tandem-operator")
    cluster.kubectl("scale", *where, "--replicas=0")
    selector = "--selector=app.kubernetes.io/component=operator"
    cluster.kubectl("wait", where[0], "--for=delete", "pod", selector, "--timeout=60s")
    folder = tmp_path_factory.mktemp("operator")
    log = folder / "operator.log"
    log.touch()
    process = OperatorProcess(kubeconfig(cluster, folder), log, "health", node_repair=True)
    process.start()
    process.wait_leading(LIMIT_S)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def chat(cluster: Running, process: OperatorProcess) -> Fleets:
    """A fleet of one prefill and three decode pods, on four nodes."""
    cluster.kubectl("create", "namespace", "health")
    fleets = Fleets(cluster, "health")
    quick = {"drainTimeoutSeconds": 10}
    fleets.apply(model(), fleet(decode=pool(3), disruption=quick))
    return fleets


@pytest.fixture(autouse=True)
def all_is_well(cluster: Running, chat: Fleets) -> Iterator[None]:
    """Every test begins with four nodes that pods can come to, a fleet that serves, no policy."""
    for node in nodes(cluster):
        cluster.kubectl("uncordon", node)
        condition(cluster, node, "False")
    eventually(lambda: len(free_nodes(cluster)) == 4)
    chat.wait_ready(timeout_s=LIMIT_S)
    eventually(lambda: len(chat.ready("chat-decode")) == 3 and len(chat.pods()) == 4)
    yield
    cluster.kubectl("delete", "nodehealthpolicies", "--all")
    for node in nodes(cluster):
        with_agent(cluster, node, signal.SIGCONT)
    cluster.revive()


def kill_machine(cluster: Running, chat: Fleets, node: str) -> None:
    """Its agent and its pods, at once."""
    everything = {
        pod["metadata"]["name"] for pod in chat.pods() if pod["spec"].get("nodeName") == node
    }
    agent = cluster.process(node)
    send_signal(agent, signal.SIGKILL)
    eventually(lambda: not is_running(agent))
    for pod in everything:
        send_signal(cluster.container("health", pod, "runtime"), signal.SIGKILL)


def test_a_condition_drains_a_node_and_its_end_undoes_all(
    cluster: Running, chat: Fleets, audit_log: Callable[[], list[Body]]
) -> None:
    node = a_decode_node(chat)
    policy(cluster)
    condition(cluster, node, "True")
    fewest = 3

    def drained() -> bool:
        nonlocal fewest
        fewest = min(fewest, len(chat.ready("chat-decode")))
        return entry(cluster, node).get("phase") == "Drained"

    eventually(drained)
    assert fewest == 3, "each was replaced before it left"
    assert not decode_on(chat, node)
    assert is_cordoned(cluster, node)
    assert is_ours(cluster, node)
    message = entry(cluster, node)["message"]
    assert message == "KernelDeadlock is True; no pods of Tandem are left"
    table = cluster.kubectl("get", "nodehealthpolicies")
    assert table.split()[:7] == [
        "NAME", "MODE", "READY", "CARRYING", "REPAIR", "ALLOWED", "AGE",
    ]  # fmt: skip
    condition(cluster, node, "False")
    wait_forgotten(cluster, node)
    eventually(lambda: not is_cordoned(cluster, node) and not is_ours(cluster, node))
    expected = {"NodeDraining", "NodeDrained", "NodeRecovered"}
    eventually(lambda: expected <= reasons_of(cluster, node))
    own = [e for e in audit_log() if e["user"]["username"] == OPERATOR]
    assert not [e["requestURI"] for e in own if e["responseStatus"].get("code") == 403]
    written = {e["objectRef"]["name"] for e in own if e.get("objectRef", {}).get("resource")
               == "nodes" and e["verb"] == "patch"}  # fmt: skip
    assert written == {node}


def test_a_dry_run_says_and_does_nothing(cluster: Running, chat: Fleets) -> None:
    node, before = a_decode_node(chat), chat.names()
    typo = [*SIGNALS["conditions"], {"type": "KernelDeadlok", "status": "True"}]
    policy(cluster, mode="DryRun", signals={**SIGNALS, "conditions": typo})
    condition(cluster, node, "True")
    found = wait_phase(cluster, node, "DryRun")
    assert found["message"] == "KernelDeadlock is True; it would be drained"
    assert chat.names() == before
    assert not is_cordoned(cluster, node)
    said = {c["type"]: c for c in status(cluster)["conditions"]}
    assert said["Ready"]["reason"] == "ConditionUnknown"
    assert "no node reports the condition KernelDeadlok" in said["Ready"]["message"]


def test_flapping_hides_nothing(cluster: Running, chat: Fleets) -> None:
    node = a_decode_node(chat)
    signals = {**SIGNALS, "clearSeconds": 30}
    policy(cluster, signals=signals)
    flaps = 0

    def flap() -> bool:
        nonlocal flaps
        flaps += 1
        condition(cluster, node, "True" if flaps % 4 < 2 else "False")
        return entry(cluster, node).get("phase") in ("Draining", "Drained")

    eventually(flap, every_s=1.0)
    assert flaps > 4


def test_a_persons_cordon_stays_a_persons(cluster: Running, chat: Fleets) -> None:
    node = a_decode_node(chat)
    cluster.kubectl("cordon", node)
    policy(cluster)
    condition(cluster, node, "True")
    wait_phase(cluster, node, "Drained")
    assert not is_ours(cluster, node)
    condition(cluster, node, "False")
    wait_forgotten(cluster, node)
    assert is_cordoned(cluster, node)


def test_a_person_who_uncordons_is_right(cluster: Running, chat: Fleets) -> None:
    node = a_decode_node(chat)
    policy(cluster)
    condition(cluster, node, "True")
    eventually(lambda: is_ours(cluster, node) and entry(cluster, node).get("cordoned"))
    cluster.kubectl("uncordon", node)
    wait_phase(cluster, node, "Released")
    eventually(lambda: not is_ours(cluster, node))
    assert not is_cordoned(cluster, node)


def test_a_pause_holds_until_it_is_taken_back(cluster: Running, chat: Fleets) -> None:
    node, before = a_decode_node(chat), chat.names()
    policy(cluster, annotations={"tandem.dev/repair-paused": "true"})
    condition(cluster, node, "True")
    assert "paused" in wait_phase(cluster, node, "Held")["message"]
    assert chat.names() == before
    assert not is_cordoned(cluster, node)
    policy(cluster, annotations={"tandem.dev/repair-paused": "false"})
    wait_phase(cluster, node, "Drained")


def test_without_room_for_another_pod_the_budget_is_kept(cluster: Running, chat: Fleets) -> None:
    """The eviction is refused until a replacement serves."""
    node = a_decode_node(chat)
    stays = decode_on(chat, node)
    policy(cluster)
    with no_room_but_on(cluster, node):
        condition(cluster, node, "True")
        eventually(lambda: "disruption budget" in entry(cluster, node).get("message", ""))
        assert decode_on(chat, node) == stays
        assert len(chat.ready("chat-decode")) == 3
    wait_phase(cluster, node, "Drained")
    assert len(chat.ready("chat-decode")) == 3


def test_two_budgets_are_waited_for_until_the_deadline(cluster: Running, chat: Fleets) -> None:
    """The API server judges no pod that two budgets select: it answers 500, not 429."""
    node = a_decode_node(chat)
    here = decode_on(chat, node)
    policy(cluster, drain={**QUICK["drain"], "afterDeadline": "Delete"})
    selector = {"matchLabels": {"tandem.dev/pool": "chat-decode"}}
    second = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "second"},
        "spec": {"maxUnavailable": 1, "selector": selector},
    }
    chat.apply(second)
    try:
        with no_room_but_on(cluster, node):
            condition(cluster, node, "True")
            refusal = "more than one PodDisruptionBudget"
            eventually(lambda: refusal in entry(cluster, node).get("message", ""))
            assert len(chat.ready("chat-decode")) == 3
            eventually(lambda: not decode_on(chat, node))
            assert len(chat.ready("chat-decode")) == 3 - len(here), "nobody else was let go"
            assert chat.events("DrainTimedOut")
    finally:
        chat.kubectl("delete", "poddisruptionbudget", "second")
    wait_phase(cluster, node, "Drained")


def test_a_pod_that_somebody_holds_is_waited_for(cluster: Running, chat: Fleets) -> None:
    """A finalizer of a stranger's: the node is drained once it is gone, and capacity is there."""
    node = a_decode_node(chat)
    pod = min(decode_on(chat, node))
    chat.edit(f"pod/{pod}", {"metadata": {"finalizers": ["example.com/stuck"]}})
    policy(cluster)
    condition(cluster, node, "True")
    try:
        eventually(lambda: chat.get(f"pod/{pod}")["metadata"].get("deletionTimestamp"))
        eventually(lambda: len(chat.ready("chat-decode")) == 3 and not decode_on(chat, node))
        assert entry(cluster, node)["phase"] == "Draining"
    finally:
        chat.edit(f"pod/{pod}", {"metadata": {"finalizers": None}})
    wait_phase(cluster, node, "Drained")


def test_a_node_that_loses_gpus_under_its_pods_is_drained(cluster: Running, chat: Fleets) -> None:
    """The device plugin takes an unhealthy device from the allocatable ones; pods run on."""
    node = a_decode_node(chat)
    whole = node_body(cluster, node)["status"]["allocatable"]["nvidia.com/gpu"]
    policy(cluster, signals={**SIGNALS, "clearSeconds": 30, "accelerators": {"forSeconds": 2}})
    try:
        allocatable(cluster, node, "0")
        found = wait_phase(cluster, node, "Drained")
        assert "0 nvidia.com/gpu are allocatable" in found["message"]
        assert len(chat.ready("chat-decode")) == 3
    finally:
        allocatable(cluster, node, whole)
    wait_forgotten(cluster, node)
    eventually(lambda: not is_cordoned(cluster, node))


def test_an_operator_that_is_killed_goes_on(
    cluster: Running, chat: Fleets, process: OperatorProcess
) -> None:
    node = a_decode_node(chat)
    for pod in decode_on(chat, node):
        chat.pretend_running(pod, 1)  # It leaves no sooner than its drain times out.
    policy(cluster)
    condition(cluster, node, "True")
    began = wait_phase(cluster, node, "Draining")["since"]
    eventually(lambda: len(chat.ready("chat-decode")) == 4)
    process.kill()
    process.start()
    process.wait_leading(LIMIT_S)
    found = wait_phase(cluster, node, "Drained")
    assert found["since"] == began
    assert len(chat.ready("chat-decode")) == 3
    condition(cluster, node, "False")
    wait_forgotten(cluster, node)
    eventually(lambda: not is_cordoned(cluster, node))


def test_all_nodes_silent_is_no_reason_to_act(cluster: Running, chat: Fleets) -> None:
    before = chat.names()
    policy(cluster)
    for node in nodes(cluster):
        with_agent(cluster, node, signal.SIGSTOP)

    def outage() -> bool:
        held = [c for c in status(cluster).get("conditions", ()) if c["type"] == "Held"]
        return bool(held) and held[0]["reason"] == "Outage" and "4 of 4" in held[0]["message"]

    eventually(outage)
    assert status(cluster)["inRepair"] == 0
    for node in nodes(cluster):
        with_agent(cluster, node, signal.SIGCONT)
    eventually(lambda: "outageSince" not in status(cluster))
    assert chat.names() == before
    assert not [node for node in nodes(cluster) if is_ours(cluster, node)]


def test_a_dead_node_is_replaced_at_once_and_given_up(cluster: Running, chat: Fleets) -> None:
    """Its agent and its pods are killed. The pods' objects go with Kubernetes' out-of-service
    taint, which is taken back when the node returns."""
    node = a_decode_node(chat)
    policy(cluster, deadNodes={"action": "OutOfService", "afterSeconds": 30})
    lost = decode_on(chat, node)
    kill_machine(cluster, chat, node)
    eventually(lambda: len(chat.ready("chat-decode")) == 3 and not decode_on(chat, node) & lost)
    here = {p["metadata"]["name"] for p in chat.pods(terminating=True)}
    assert lost <= here, "nobody is there to finish them"
    wait_phase(cluster, node, "OutOfService")
    eventually(lambda: not lost & {p["metadata"]["name"] for p in chat.pods(terminating=True)})
    cluster.revive()
    wait_forgotten(cluster, node)
    eventually(lambda: node in free_nodes(cluster))


def test_a_node_that_is_deleted_leaves_nothing_behind(cluster: Running, chat: Fleets) -> None:
    """As a cloud does with a machine that it takes back, pods and all. They look Ready until
    Kubernetes' garbage collector finds them, a minute later: that is not waited for."""
    node = a_decode_node(chat)
    policy(cluster)
    lost = decode_on(chat, node)
    stay = chat.names("chat-decode") - lost
    uids = {pod["metadata"]["uid"] for pod in chat.pods() if pod["spec"].get("nodeName") == node}
    kill_machine(cluster, chat, node)
    cluster.kubectl("delete", "node", node)
    eventually(lambda: len(set(chat.ready("chat-decode")) - lost - stay) == len(lost))
    # Not by name: the name of a pod that is gone is free for the next one.
    eventually(lambda: not uids & {p["metadata"]["uid"] for p in chat.pods(terminating=True)})
    eventually(lambda: len(chat.ready("chat-decode")) == 3)
    eventually(lambda: not entry(cluster, node))
    cluster.revive()
    eventually(lambda: node in free_nodes(cluster))
    assert not is_cordoned(cluster, node)
