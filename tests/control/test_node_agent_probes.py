"""A node agent probes containers as a kubelet does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Kubectl = Callable[..., str]
Objects = Callable[..., Any]


def test_readiness_follows_the_probe(
    run: Objects, container: Objects, kubectl: Kubectl, namespace: str, eventually: Objects,
    reasons: Objects,
) -> None:  # fmt: skip
    probe = {"exec": {"command": ["test", "-e", "/tmp/ok"]}, "periodSeconds": 1,
             "failureThreshold": 1}  # fmt: skip
    run("p", "touch /tmp/ok; exec sleep 600", {"readinessProbe": probe})
    kubectl("exec", "p", "-n", namespace, "--", "rm", "/tmp/ok")
    eventually(lambda: not container("p")["ready"])
    assert "Readiness probe failed" in eventually(lambda: reasons("p").get("Unhealthy"))
    kubectl("exec", "p", "-n", namespace, "--", "touch", "/tmp/ok")
    eventually(lambda: container("p")["ready"])
    assert container("p")["restartCount"] == 0


def test_liveness_restarts_and_startup_holds_it_back(
    run: Objects, container: Objects, kubectl: Kubectl, namespace: str, eventually: Objects,
    reasons: Objects,
) -> None:  # fmt: skip
    server = """
import http.server, os, pathlib, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500 if pathlib.Path("/tmp/sick").exists() else 200)
        self.end_headers()
    def log_message(self, *_): pass
time.sleep(1.5)
http.server.HTTPServer((os.environ["IP"], 8000), Handler).serve_forever()
"""
    http = {"httpGet": {"path": "/", "port": "web"}, "periodSeconds": 1}
    run(
        "p",
        container={
            "command": ["python", "-c", server],
            "ports": [{"name": "web", "containerPort": 8000}],
            "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
            "startupProbe": {**http, "failureThreshold": 20},
            "livenessProbe": {**http, "failureThreshold": 2},
            "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
        },
    )
    assert container("p")["restartCount"] == 0
    kubectl("exec", "p", "-n", namespace, "--", "touch", "/tmp/sick")
    eventually(lambda: container("p")["restartCount"] == 1)
    assert "liveness probe failed" in reasons("p")["Killing"]
    # /tmp was the old container's own, so the new one is well.
    eventually(lambda: container("p")["ready"])
    assert container("p")["lastState"]["terminated"]["exitCode"] in (137, 143)


def test_a_probe_that_a_node_cannot_do_says_so(
    apply: Objects, make_pod: Objects, reasons: Objects, eventually: Objects
) -> None:
    apply(make_pod("p", container={"readinessProbe": {"grpc": {"port": 80}}}))
    message = eventually(lambda: reasons("p").get("Unhealthy"))
    assert "cannot do grpc probes: use httpGet, tcpSocket or exec" in message
