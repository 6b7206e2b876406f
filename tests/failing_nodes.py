"""Nodes that fail, and the NodeHealthPolicy that looks after them, as `kubectl` shows them."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fleets import Fleets
from fleets import eventually as soon
from tandem.cluster.process import send_signal
from tandem.cluster.running import Running

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


def allocatable(cluster: Running, node: str, gpus: str) -> None:
    """As a device plugin's answer changes it."""
    patch = json.dumps({"status": {"allocatable": {"nvidia.com/gpu": gpus}}})
    cluster.kubectl("patch", "node", node, "--subresource=status", "--type=merge", "-p", patch)


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
    """One with as few decode pods as any that has some."""
    count = Counter(str(pod["spec"]["nodeName"]) for pod in chat.pods("chat-decode"))
    return min(count, key=lambda node: count[node])


def is_cordoned(cluster: Running, node: str) -> bool:
    return bool(node_body(cluster, node)["spec"].get("unschedulable"))


def is_ours(cluster: Running, node: str) -> bool:
    return CORDONED in (node_body(cluster, node)["metadata"].get("annotations") or {})


def reasons_of(cluster: Running, node: str) -> set[str]:
    text = cluster.kubectl("get", "events.events.k8s.io", "-n=default", "-o", "json")
    items = json.loads(text)["items"]
    return {e["reason"] for e in items if e["regarding"].get("name") == node}


@contextmanager
def no_room_but_on(cluster: Running, node: str) -> Iterator[None]:
    """No other node takes pods meanwhile."""
    others = [other for other in nodes(cluster) if other != node]
    for other in others:
        cluster.kubectl("taint", "node", other, "example.com/full=:NoSchedule")
    try:
        yield
    finally:
        for other in others:
            cluster.kubectl("taint", "node", other, "example.com/full-")
