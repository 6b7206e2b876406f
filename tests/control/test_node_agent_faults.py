"""Nodes fail: agents are killed and stopped, and come back. A cluster with short graces."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tandem.agent.store import Store
from tandem.cluster.process import is_running, send_signal
from tandem.cluster.running import KubectlError, Running
from tandem.cluster.spec import ClusterSpec, NodeTimings

Objects = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster(start_cluster: Objects) -> Running:
    """Four nodes; a silent one is noticed after 4 s, its pods leave 5 s later."""
    timings = NodeTimings(grace_s=4.0, toleration_s=5, evictions_per_s=10.0)
    name = f"fault-{secrets.token_hex(3)}"
    running: Running = start_cluster(ClusterSpec(name=name, operator=False, timings=timings))
    return running


@pytest.fixture(autouse=True)
def all_nodes_ready(cluster: Running, eventually: Objects) -> Iterator[None]:
    """Every test begins and ends with four living nodes."""
    eventually(lambda: ready_nodes(cluster) == 4, timeout_s=60)
    yield
    for name in cluster.cluster.spec.node_names():
        try:
            send_signal(cluster.process(name), signal.SIGCONT)
        except KubectlError:
            continue
        except LookupError:
            continue
    cluster.revive()


def ready_nodes(cluster: Running) -> int:
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    return sum(
        1 for node in nodes if node_status(node) == "True" and not node["spec"].get("taints")
    )


def node_status(node: dict[str, Any]) -> str:
    conditions = node["status"]["conditions"]
    return str(next(c["status"] for c in conditions if c["type"] == "Ready"))


@pytest.fixture
def on_node(
    apply: Objects, make_pod: Objects, cluster: Running, namespace: str
) -> Callable[..., None]:
    """A Ready pod on node-2 that tolerates anything, so that it stays."""

    def run(name: str, *arguments: Any, **changes: Any) -> None:
        stays = {"operator": "Exists"}
        apply(make_pod(name, *arguments, nodeName="node-2", tolerations=[stays], **changes))
        cluster.kubectl("wait", f"pod/{name}", "--for=condition=Ready", "-n", namespace)

    return run


def kill_agent(cluster: Running, eventually: Objects, node: str = "node-2") -> None:
    process = cluster.process(node)
    send_signal(process, signal.SIGKILL)
    eventually(lambda: not is_running(process))


def test_containers_outlive_their_agent_and_are_adopted(
    on_node: Objects, cluster: Running, namespace: str, get: Objects, eventually: Objects
) -> None:
    on_node("p", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done")
    process = cluster.container(namespace, "p", "c")
    before = get("pod", "p")["status"]
    kill_agent(cluster, eventually)
    time.sleep(0.5)
    assert is_running(process)
    assert cluster.revive() == ["node-2"]
    lines = eventually(lambda: cluster.kubectl("logs", "p", "-n", namespace)).split()
    assert lines == [str(n) for n in range(len(lines))], "no line is lost or printed twice"
    after = get("pod", "p")["status"]
    assert cluster.container(namespace, "p", "c") == process
    assert after["containerStatuses"][0]["restartCount"] == 0
    assert after["podIP"] == before["podIP"]
    assert after["startTime"] == before["startTime"]
    transitions = [
        {c["type"]: c["lastTransitionTime"] for c in status["conditions"]}
        for status in (before, after)
    ]
    assert transitions[0]["Initialized"] == transitions[1]["Initialized"]
    cluster.kubectl("delete", "pod", "p", "-n", namespace, "--timeout=20s")
    assert not is_running(process)


def test_an_end_that_nobody_saw_is_known(
    on_node: Objects, cluster: Running, namespace: str, get: Objects, eventually: Objects
) -> None:
    script = "sleep 2; echo last words; printf why > /dev/termination-log; exit 6"
    on_node("p", script, restartPolicy="Never")
    process = cluster.container(namespace, "p", "c")
    kill_agent(cluster, eventually)
    eventually(lambda: not is_running(process))
    cluster.revive()
    eventually(lambda: get("pod", "p")["status"]["phase"] == "Failed")
    ended = get("pod", "p")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (6, "why")
    assert cluster.kubectl("logs", "p", "-n", namespace) == "last words\n"


def test_a_pod_deleted_meanwhile_ends_when_the_agent_is_back(
    on_node: Objects, cluster: Running, namespace: str, eventually: Objects
) -> None:
    on_node("polite")
    on_node("forced")
    processes = [cluster.container(namespace, name, "c") for name in ("polite", "forced")]
    kill_agent(cluster, eventually)
    cluster.kubectl("delete", "pod", "polite", "-n", namespace, "--wait=false")
    cluster.kubectl("delete", "pod", "forced", "-n", namespace, "--grace-period=0", "--force")
    time.sleep(0.5)
    assert all(is_running(process) for process in processes)
    cluster.revive()
    eventually(lambda: not any(is_running(process) for process in processes))
    cluster.kubectl("wait", "pod/polite", "--for=delete", "-n", namespace, "--timeout=20s")
    eventually(lambda: Store(cluster.folder.node("node-2")).pods() == [])


def test_tokens_are_asked_for_again(
    on_node: Objects, cluster: Running, namespace: str, eventually: Objects
) -> None:
    """A new agent has no token of the old one, so the file changes under the running pod."""
    on_node("p")
    path = "/var/run/secrets/kubernetes.io/serviceaccount/token"

    def token() -> str:
        return cluster.kubectl("exec", "p", "-n", namespace, "--", "cat", path)

    first = token()
    time.sleep(1.1)  # Tokens of the same second are equal.
    kill_agent(cluster, eventually)
    cluster.revive()
    eventually(lambda: token() != first)


def test_a_dead_node_is_noticed_and_its_pods_move(
    apply: Objects, make_pod: Objects, cluster: Running, namespace: str, eventually: Objects
) -> None:
    pod = make_pod("web", "trap 'exit 0' TERM; while :; do sleep 0.1; done")
    spec = {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": pod["spec"]},
    }
    apply(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}
    )
    cluster.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=30s")

    def pods() -> list[dict[str, Any]]:
        text = cluster.kubectl("get", "pods", "-n", namespace, "-o", "json")
        found: list[dict[str, Any]] = json.loads(text)["items"]
        return found

    victim = pods()[0]
    name, node = victim["metadata"]["name"], victim["spec"]["nodeName"]
    process = cluster.container(namespace, name, "c")
    kill_agent(cluster, eventually, node)

    def is_unknown() -> bool:
        return (
            node_status(json.loads(cluster.kubectl("get", "node", node, "-o", "json"))) == "Unknown"
        )

    eventually(is_unknown, timeout_s=20)

    def moved() -> bool:
        here = [p for p in pods() if "deletionTimestamp" not in p["metadata"]]
        ready = [
            p
            for p in here
            if p["spec"].get("nodeName") != node
            and any(
                c["type"] == "Ready" and c["status"] == "True"
                for c in p["status"].get("conditions") or []
            )
        ]
        return len(ready) == 2

    eventually(moved, timeout_s=40)
    assert is_running(process), "nobody is there to end the old pod"
    assert any(p["metadata"]["name"] == name for p in pods()), "and nobody to finish its object"
    cluster.revive()
    eventually(lambda: not is_running(process))
    eventually(lambda: all(p["metadata"]["name"] != name for p in pods()))


def test_a_stopped_agent_is_a_hung_node(
    on_node: Objects, cluster: Running, namespace: str, eventually: Objects
) -> None:
    on_node("p")
    agent = cluster.process("node-2")
    process = cluster.container(namespace, "p", "c")
    os.kill(agent.pid, signal.SIGSTOP)
    eventually(lambda: ready_nodes(cluster) == 3, timeout_s=20)
    os.kill(agent.pid, signal.SIGCONT)
    eventually(lambda: ready_nodes(cluster) == 4, timeout_s=20)
    assert is_running(process)


def test_the_api_server_may_go_away_for_a_while(
    on_node: Objects, cluster: Running, namespace: str, get: Objects, eventually: Objects
) -> None:
    on_node("p", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done")
    process = cluster.container(namespace, "p", "c")
    server = cluster.process("kube-apiserver")
    send_signal(server, signal.SIGKILL)
    eventually(lambda: not is_running(server))
    time.sleep(1)
    assert "kube-apiserver" in cluster.revive()
    eventually(lambda: ready_nodes(cluster) == 4, timeout_s=60)
    assert cluster.container(namespace, "p", "c") == process
    assert get("pod", "p")["status"]["containerStatuses"][0]["restartCount"] == 0
    cluster.kubectl("delete", "pod", "p", "-n", namespace, "--timeout=30s")
    assert not is_running(process)


def shims(cluster: Running) -> list[str]:
    """The run folders of all living shims of the cluster, by the command lines of the machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "run" in words and any(str(cluster.folder.root) in word for word in words):
            found.append(words[words.index("run") + 1])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_each_container_runs_once(
    apply: Objects, make_pod: Objects, cluster: Running, namespace: str, eventually: Objects,
    get: Objects, seed: int,
) -> None:  # fmt: skip
    chance = random.Random(seed)
    init = [{"name": "i", "image": "tandem.dev/runtime:0.1.0", "command": ["true"]}]
    stays = {"nodeName": "node-2", "tolerations": [{"operator": "Exists"}]}
    names = [f"p{n}" for n in range(4)]
    apply(*(make_pod(name, initContainers=init, **stays) for name in names))
    for _ in range(2):
        time.sleep(chance.uniform(0.0, 0.6))
        kill_agent(cluster, eventually)
        cluster.revive()
    ready = [f"pod/{name}" for name in names]
    cluster.kubectl("wait", *ready, "--for=condition=Ready", "-n", namespace, "--timeout=40s")
    eventually(lambda: len([path for path in shims(cluster) if path.split("/")[-2] == "c"]) == 4)
    assert len(shims(cluster)) == 4
    cluster.kubectl("delete", "pod", *names, "-n", namespace, "--wait=false")
    time.sleep(chance.uniform(0.0, 0.6))
    kill_agent(cluster, eventually)
    cluster.revive()
    cluster.kubectl("wait", *ready, "--for=delete", "-n", namespace, "--timeout=40s")
    eventually(lambda: shims(cluster) == [])
    eventually(lambda: Store(cluster.folder.node("node-2")).pods() == [])
