"""Failing nodes on a real control plane: agents that die, conditions, people, an operator that is
killed meanwhile. One cluster with short graces, one fleet, one policy that each test sets."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from fleets import Fleets, fleet, model, pool
from fleets import eventually as soon
from operator_process import OperatorProcess, kubeconfig
from tandem.cluster.process import is_running, send_signal
from tandem.cluster.running import Running
from tandem.cluster.spec import ClusterSpec, NodeTimings
from tandem.cluster.up import install

pytestmark = pytest.mark.timeout(900)

Body = dict[str, Any]
T = TypeVar("T")
LIMIT_S = 200.0
"""However busy the machine is."""
CONDITION = "KernelDeadlock"
OPERATOR = "system:serviceaccount:tandem-system:tandem-operator"
CORDONED = "tandem.dev/cordoned"
SIGNALS = {
    "notReady": {"forSeconds": 2},
    "conditions": [{"type": CONDITION, "status": "True", "forSeconds": 3}],
    "clearSeconds": 3,
}
QUICK: Body = {
    "mode": "Active",
    "signals": SIGNALS,
    "drain": {"evictAfterSeconds": 1, "deadlineSeconds": 45},
    "brakes": {"calmSeconds": 2},
}


def eventually(look: Callable[[], T], timeout_s: float = LIMIT_S, every_s: float = 0.2) -> T:
    return soon(look, timeout_s, every_s)


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


def nodes(cluster: Running) -> list[str]:
    return cluster.cluster.spec.node_names()


def with_agent(cluster: Running, node: str, number: signal.Signals) -> None:
    try:
        send_signal(cluster.process(node), number)
    except LookupError:
        return


def node_body(cluster: Running, node: str) -> Body:
    body: Body = json.loads(cluster.kubectl("get", "node", node, "-o", "json"))
    return body


def free_nodes(cluster: Running) -> list[str]:
    items = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    return [
        node["metadata"]["name"]
        for node in items
        if not node["spec"].get("taints") and not node["spec"].get("unschedulable")
    ]


def condition(cluster: Running, node: str, status: str) -> None:
    """As node-problem-detector would."""
    entry = {"type": CONDITION, "status": status, "reason": "Test", "message": ""}
    patch = json.dumps({"status": {"conditions": [entry]}})
    cluster.kubectl("patch", "node", node, "--subresource=status", "--type=strategic", "-p", patch)


def policy(cluster: Running, *, annotations: Body | None = None, **spec: Any) -> None:
    body = {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "NodeHealthPolicy",
        "metadata": {"name": "default", "annotations": annotations or {}},
        "spec": {**QUICK, **spec},
    }
    cluster.kubectl("apply", "-f", "-", input=json.dumps(body))


def status(cluster: Running) -> Body:
    text = cluster.kubectl("get", "nodehealthpolicy", "default", "-o", "json")
    found: Body = json.loads(text).get("status", {})
    return found


def entry(cluster: Running, node: str) -> Body:
    return next((n for n in status(cluster).get("nodes", []) if n["name"] == node), {})


def wait_phase(cluster: Running, node: str, *phases: str) -> Body:
    def look() -> Body:
        found = entry(cluster, node)
        return found if found.get("phase") in phases else {}

    return eventually(look)


def wait_forgotten(cluster: Running, node: str) -> None:
    eventually(lambda: status(cluster).get("inRepair") == 0 and not entry(cluster, node))


def decode_on(chat: Fleets, node: str) -> set[str]:
    return {
        pod["metadata"]["name"]
        for pod in chat.pods("chat-decode")
        if pod["spec"].get("nodeName") == node
    }


def a_decode_node(chat: Fleets) -> str:
    node: str = chat.pods("chat-decode")[0]["spec"]["nodeName"]
    return node


def is_cordoned(cluster: Running, node: str) -> bool:
    return bool(node_body(cluster, node)["spec"].get("unschedulable"))


def is_ours(cluster: Running, node: str) -> bool:
    return CORDONED in (node_body(cluster, node)["metadata"].get("annotations") or {})


def reasons_of(cluster: Running, node: str) -> set[str]:
    text = cluster.kubectl("get", "events.events.k8s.io", "-n=default", "-o", "json")
    items = json.loads(text)["items"]
    return {e["reason"] for e in items if e["regarding"].get("name") == node}


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
    others = [other for other in nodes(cluster) if other != node]
    policy(cluster)
    for other in others:
        cluster.kubectl("taint", "node", other, "example.com/full=:NoSchedule")
    try:
        condition(cluster, node, "True")
        eventually(lambda: "disruption budget" in entry(cluster, node).get("message", ""))
        assert decode_on(chat, node) == stays
        assert len(chat.ready("chat-decode")) == 3
    finally:
        for other in others:
            cluster.kubectl("taint", "node", other, "example.com/full-")
    wait_phase(cluster, node, "Drained")
    assert len(chat.ready("chat-decode")) == 3


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
    everything = {
        pod["metadata"]["name"] for pod in chat.pods() if pod["spec"].get("nodeName") == node
    }
    agent = cluster.process(node)
    send_signal(agent, signal.SIGKILL)
    eventually(lambda: not is_running(agent))
    for pod in everything:
        send_signal(cluster.container("health", pod, "runtime"), signal.SIGKILL)
    eventually(lambda: len(chat.ready("chat-decode")) == 3 and not decode_on(chat, node) & lost)
    here = {p["metadata"]["name"] for p in chat.pods(terminating=True)}
    assert lost <= here, "nobody is there to finish them"
    wait_phase(cluster, node, "OutOfService")
    eventually(lambda: not lost & {p["metadata"]["name"] for p in chat.pods(terminating=True)})
    cluster.revive()
    wait_forgotten(cluster, node)
    eventually(lambda: node in free_nodes(cluster))
