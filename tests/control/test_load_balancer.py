"""A Service of type LoadBalancer answers on 127.0.0.1, from its Ready pods."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.process import is_running
from tandem.cluster.running import Running
from tandem_runtime import contract

Kubectl = Callable[..., str]
Objects = Callable[..., Any]

SERVER = """
import http.server, os, signal, sys, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(20):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        self.wfile.write(os.environ["NAME"].encode())
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer((os.environ["IP"], 8000), Handler)
server.daemon_threads = False
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()
"""


def field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


@pytest.fixture
def service(
    apply: Objects, make_pod: Objects, get: Objects, kubectl: Kubectl, namespace: str,
    eventually: Objects,
) -> Callable[[], str]:  # fmt: skip
    """Two servers behind a Service; gives the URL once it is announced."""
    container = {
        "command": ["python", "-c", SERVER],
        "env": [field("IP", "status.podIP"), field("NAME", "metadata.name")],
        "ports": [{"name": "web", "containerPort": 8000}],
        "readinessProbe": {"tcpSocket": {"port": "web"}, "periodSeconds": 1},
    }
    pods = [make_pod(name, container=container) for name in ("a", "b")]
    for pod in pods:
        pod["metadata"]["labels"] = {"app": "web"}
        pod["spec"]["terminationGracePeriodSeconds"] = 10
    ports = [{"name": "http", "port": 80, "targetPort": "web"}, {"name": "x", "port": 81}]
    spec = {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": ports}
    apply(*pods, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec})
    kubectl("wait", "pod", "--all", "--for=condition=Ready", "-n", namespace, "--timeout=30s")

    def url() -> str | None:
        annotations = get("service", "web")["metadata"].get("annotations") or {}
        return annotations.get(contract.ANNOTATION_EXTERNAL_URL)

    return lambda: f"http://{eventually(url)}"


def ask(url: str, timeout_s: float = 10.0) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout_s) as answer:
        text: str = answer.read().decode()
        return text


def test_it_is_announced_and_takes_turns(
    service: Callable[[], str], get: Objects, cluster: Running
) -> None:
    url = service()
    assert get("service", "web")["status"]["loadBalancer"]["ingress"] == [
        {"ip": "127.0.0.1", "ipMode": "Proxy"}
    ]
    node_port = get("service", "web")["spec"]["ports"][0]["nodePort"]
    assert url == f"http://127.0.0.1:{node_port}"
    first, last = cluster.cluster.network.node_ports
    assert first <= node_port <= last
    answers = [ask(url) for _ in range(6)]
    assert sorted(answers) == ["a"] * 3 + ["b"] * 3


def test_a_terminating_pod_gets_no_new_connection_but_keeps_its_old(
    service: Callable[[], str], kubectl: Kubectl, namespace: str, get: Objects, eventually: Objects
) -> None:
    url = service()
    slow: list[str] = []
    threads = [threading.Thread(target=lambda: slow.append(ask(f"{url}/slow"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    kubectl("delete", "pod", "a", "-n", namespace, "--wait=false")
    time.sleep(0.3)
    assert {ask(url) for _ in range(6)} == {"b"}
    for thread in threads:
        thread.join()
    assert sorted(slow) == ["x" * 20 + "a", "x" * 20 + "b"]


def test_a_refused_connection_goes_to_another_pod(
    service: Callable[[], str], cluster: Running, namespace: str, eventually: Objects
) -> None:
    url = service()
    # Killed, and for a moment still Ready in the API.
    process = cluster.container(namespace, "a", "c")
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: not is_running(process))
    assert [ask(url) for _ in range(4)].count("b") >= 2


def test_without_a_ready_pod_the_connection_is_closed(
    service: Callable[[], str], kubectl: Kubectl, namespace: str
) -> None:
    url = service()
    kubectl("delete", "pod", "a", "b", "-n", namespace)
    with pytest.raises(OSError, match=r"reset|closed|refused"):
        ask(url)


def test_a_deleted_service_frees_its_port(
    service: Callable[[], str], kubectl: Kubectl, namespace: str, eventually: Objects
) -> None:
    port = int(service().rsplit(":", 1)[1])
    kubectl("delete", "service", "web", "-n", namespace)

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    eventually(refused)


def test_it_may_do_just_this(cluster: Running) -> None:
    def allowed(verb: str, what: str) -> bool:
        command = ("auth", "can-i", verb, what, "-A", "--as=tandem-load-balancer")
        try:
            return cluster.kubectl(*command).strip() == "yes"
        except RuntimeError:
            return False

    assert allowed("list", "pods")
    assert allowed("patch", "services/status")
    assert not allowed("get", "secrets")
    assert not allowed("create", "pods")
    assert not allowed("delete", "services")


def test_it_writes_only_what_changes(
    audit_log: Objects, service: Callable[[], str], kubectl: Kubectl, namespace: str
) -> None:
    service()
    kubectl("label", "service", "web", "-n", namespace, "touched=yes")
    time.sleep(1.0)
    writes = [
        event
        for event in audit_log()
        if event["user"]["username"] == "tandem-load-balancer"
        and event["verb"] == "patch"
        and event["objectRef"]["namespace"] == namespace
    ]
    assert len(writes) == 2, json.dumps(writes)
