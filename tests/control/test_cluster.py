"""The local cluster is a real control plane with RBAC on, and schedules as one."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from tandem.agent.api import Api, ApiError
from tandem.cli import app
from tandem.cluster.pins import Pins
from tandem.cluster.running import KubectlError, Running
from typer.testing import CliRunner

Kubectl = Callable[..., str]
Objects = Callable[..., Any]


def test_the_api_server_has_the_pinned_version(kubectl: Kubectl) -> None:
    version = json.loads(kubectl("get", "--raw", "/version"))
    assert version["gitVersion"] == f"v{Pins.read().kubernetes}"


def test_nodes_are_ready_with_their_resources_and_places(kubectl: Kubectl) -> None:
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    assert [node["metadata"]["name"] for node in nodes] == ["node-1", "node-2", "node-3", "node-4"]
    racks = [node["metadata"]["labels"]["tandem.dev/rack"] for node in nodes]
    assert racks == ["rack-1", "rack-1", "rack-2", "rack-2"]
    for node in nodes:
        assert node["status"]["allocatable"]["nvidia.com/gpu"] == "8"
        ready = [c for c in node["status"]["conditions"] if c["type"] == "Ready"]
        assert ready[0]["status"] == "True"
        assert node["metadata"]["labels"]["topology.kubernetes.io/zone"] == "zone-1"
    addresses = {a["address"] for n in nodes for a in n["status"]["addresses"]}
    assert len({a for a in addresses if a.startswith("127.")}) == 4


def test_anonymous_requests_may_ask_for_health_only(cluster: Running) -> None:
    context = ssl.create_default_context(cafile=str(cluster.admin.ca))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )

    def status(path: str) -> int:
        try:
            with opener.open(cluster.admin.server + path) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    assert status("/livez") == 200
    assert status("/readyz") == 200
    assert status("/version") == 401
    assert status("/api/v1/namespaces") == 401


def test_a_service_account_may_do_nothing_by_itself(kubectl: Kubectl, namespace: str) -> None:
    account = f"--as=system:serviceaccount:{namespace}:default"
    with pytest.raises(KubectlError, match="is forbidden"):
        kubectl("get", "pods", "-n", namespace, account)


async def test_a_node_may_only_touch_itself(cluster: Running, namespace: str) -> None:
    pki = cluster.folder.pki
    node = type(cluster.admin)(
        cluster.admin.server, pki / "ca.crt", pki / "node-1.crt", pki / "node-1.key"
    )
    async with Api.connect(node, user_agent="test") as api:
        mine = await api.get("/api/v1/pods", {"fieldSelector": "spec.nodeName=node-1"})
        assert mine["kind"] == "PodList"
        other = {"metadata": {"labels": {"x": "y"}}}
        for attempt in (
            api.get("/api/v1/pods"),
            api.get(f"/api/v1/namespaces/{namespace}/secrets"),
            api.patch("/api/v1/nodes/node-2", other),
        ):
            with pytest.raises(ApiError) as refusal:
                await attempt
            assert refusal.value.status == 403


def test_pods_are_scheduled_by_gpus(
    apply: Objects, get: Objects, make_pod: Objects, kubectl: Kubectl, namespace: str,
    eventually: Objects,
) -> None:  # fmt: skip
    eight = {"resources": {"limits": {"nvidia.com/gpu": "8"}}}
    apply(*(make_pod(f"p{n}", container=eight) for n in range(5)))
    ready = ["wait", "pod", "--all", "--for=condition=Ready", "-n", namespace]
    with pytest.raises(KubectlError, match="timed out"):
        kubectl(*ready, "--timeout=8s")
    pods = [get("pod", f"p{n}") for n in range(5)]
    placed = [pod["spec"]["nodeName"] for pod in pods if "nodeName" in pod["spec"]]
    assert sorted(placed) == ["node-1", "node-2", "node-3", "node-4"]
    left = next(pod for pod in pods if "nodeName" not in pod["spec"])
    assert "Insufficient nvidia.com/gpu" in left["status"]["conditions"][0]["message"]
    first = next(pod for pod in pods if "nodeName" in pod["spec"])
    kubectl("delete", "pod", first["metadata"]["name"], "-n", namespace)
    kubectl("wait", f"pod/{left['metadata']['name']}", "--for=condition=Ready", "-n", namespace,
            "--timeout=20s")  # fmt: skip


def test_the_audit_log_tells_who_did_what(
    kubectl: Kubectl, namespace: str, audit_log: Objects, eventually: Objects
) -> None:
    kubectl("create", "configmap", "seen", "-n", namespace)

    def seen() -> list[dict[str, Any]]:
        return [
            event
            for event in audit_log()
            if event["verb"] == "create"
            and event["objectRef"]["resource"] == "configmaps"
            and event["objectRef"].get("name") == "seen"
        ]

    event = eventually(seen)[0]
    assert event["user"]["username"] == "kubernetes-admin"
    assert event["responseStatus"]["code"] == 201
    assert event["level"] == "Metadata"
    assert "requestObject" not in event


def test_status_shows_every_process(cluster: Running) -> None:
    result = CliRunner().invoke(app, ["status", "--name", cluster.name])
    assert result.exit_code == 0, result.output
    for name in ("etcd", "kube-apiserver", "kube-scheduler", "node-1", "load-balancer"):
        assert name in result.output
    path = CliRunner().invoke(app, ["kubeconfig", "--name", cluster.name]).output.strip()
    assert path == str(cluster.kubeconfig)
    assert cluster.kubeconfig.stat().st_mode & 0o777 == 0o600
