"""What a container gets: environment, GPUs, volumes, tokens, CPU limits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from tandem.cluster.running import Running

Kubectl = Callable[..., str]
Objects = Callable[..., Any]
Pod = dict[str, Any]

CPU_HIERARCHIES = ("/sys/fs/cgroup/cgroup.subtree_control", "/sys/fs/cgroup/cpu")


def test_environment(
    run: Objects, apply: Objects, kubectl: Kubectl, namespace: str, cluster: Running
) -> None:
    apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"K": "v"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"},
         "stringData": {"PW": "hush"}},
    )  # fmt: skip

    def from_field(name: str, path: str) -> Pod:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    container = {
        "env": [
            from_field("IP", "status.podIP"),
            from_field("NODE", "spec.nodeName"),
            from_field("HOST_IP", "status.hostIP"),
            from_field("UID", "metadata.uid"),
            {"name": "PW", "valueFrom": {"secretKeyRef": {"name": "s", "key": "PW"}}},
            {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
            {"name": "URL", "value": "http://$(IP):$(K)"},
        ],
        "envFrom": [{"configMapRef": {"name": "cm"}}],
        "resources": {"limits": {"memory": "64Mi", "nvidia.com/gpu": "2"}},
        "args": ["unused", "$(NODE)"],
    }
    pod = run("p", container=container)
    text = kubectl("exec", "p", "-n", namespace, "--", "env")
    env = dict(line.split("=", 1) for line in text.splitlines())
    ip = pod["status"]["podIP"]
    assert env["IP"] == ip
    assert ip.startswith(cluster.cluster.network.prefix)
    assert env["NODE"] == pod["spec"]["nodeName"]
    assert env["HOST_IP"] == pod["status"]["hostIP"]
    assert env["UID"] == pod["metadata"]["uid"]
    assert (env["PW"], env["MEMORY"], env["URL"]) == ("hush", str(64 * 2**20), f"http://{ip}:v")
    assert env["TANDEM_PRETEND_ACCELERATOR"] == "1"
    assert len(env["NVIDIA_VISIBLE_DEVICES"].split(",")) == 2
    assert env["KUBERNETES_SERVICE_HOST"] == cluster.cluster.network.host


def test_gpus_are_given_by_index(run: Objects, kubectl: Kubectl, namespace: str) -> None:
    def gpus(name: str, count: int) -> set[str]:
        limits = {"resources": {"limits": {"nvidia.com/gpu": str(count)}}}
        run(name, container=limits, nodeName="node-1")
        text = kubectl("exec", name, "-n", namespace, "--", "printenv", "NVIDIA_VISIBLE_DEVICES")
        return set(text.strip().split(","))

    first, second = gpus("a", 4), gpus("b", 2)
    assert (len(first), len(second)) == (4, 2)
    assert not first & second
    kubectl("delete", "pod", "a", "-n", namespace)
    # Of eight, these four are there only because `a` gave its own back.
    third = gpus("c", 4)
    assert len(third) == 4
    assert not third & second


def test_volumes_follow_their_objects(
    run: Objects, apply: Objects, kubectl: Kubectl, namespace: str, eventually: Objects
) -> None:
    def config_map(value: str) -> Pod:
        meta = {"name": "cm"}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"k": value}}

    apply(config_map("one"))
    field = {"fieldPath": "metadata.labels['app']"}
    run(
        "p",
        container={
            "volumeMounts": [
                {"name": "cm", "mountPath": "/cm"},
                {"name": "info", "mountPath": "/etc/info"},
                {"name": "scratch", "mountPath": "/scratch"},
                {"name": "cm", "mountPath": "/opt/only", "subPath": "k"},
            ]
        },
        volumes=[
            {"name": "cm", "configMap": {"name": "cm"}},
            {"name": "info", "downwardAPI": {"items": [{"path": "app", "fieldRef": field}]}},
            {"name": "scratch", "emptyDir": {"medium": "Memory"}},
        ],
    )

    def cat(path: str) -> str:
        return kubectl("exec", "p", "-n", namespace, "--", "cat", path)

    assert (cat("/cm/k"), cat("/etc/info/app"), cat("/opt/only")) == ("one", "p", "one")
    kubectl("exec", "p", "-n", namespace, "--", "sh", "-c", "echo x > /scratch/f")
    kubectl("label", "pod", "p", "-n", namespace, "--overwrite", "app=renamed")
    eventually(lambda: cat("/etc/info/app") == "renamed")
    apply(config_map("two"))

    def after_a_change_of_the_pod() -> bool:
        """Contents are checked with each change of the pod, and every minute."""
        kubectl("annotate", "pod", "p", "-n", namespace, "--overwrite", f"now={time.time()}")
        return cat("/cm/k") == "two"

    eventually(after_a_change_of_the_pod)
    assert cat("/opt/only") == "one"


def test_a_claim_of_a_folder_of_the_machine(
    run: Objects, apply: Objects, kubectl: Kubectl, namespace: str, tmp_path: Any,
    eventually: Objects,
) -> None:  # fmt: skip
    (tmp_path / "weights").write_text("real\n")
    tmp_path.chmod(0o755)
    size = {"storage": "1Mi"}
    apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace},
         "spec": {"capacity": size, "accessModes": ["ReadOnlyMany"], "storageClassName": "",
                  "hostPath": {"path": str(tmp_path)},
                  "claimRef": {"namespace": namespace, "name": "data"}}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
         "spec": {"accessModes": ["ReadOnlyMany"], "storageClassName": "",
                  "volumeName": namespace, "resources": {"requests": size}}},
    )  # fmt: skip
    claim = {"name": "d", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}}
    mount = {"volumeMounts": [{"name": "d", "mountPath": "/data"}]}
    run("p", "cat /data/weights; exec sleep 600", mount, volumes=[claim])
    eventually(lambda: kubectl("logs", "p", "-n", namespace) == "real\n")
    kubectl("delete", "pv", namespace, "--wait=false")


def test_a_volume_that_cannot_be_made_says_why_and_is_tried_again(
    apply: Objects, make_pod: Objects, reasons: Objects, eventually: Objects, container: Objects
) -> None:
    volume = {"name": "v", "configMap": {"name": "late"}}
    apply(make_pod("p", volumes=[volume]))
    message = eventually(lambda: reasons("p").get("FailedMount"))
    assert 'volume "v": configmap "late" not found' in message
    assert container("p")["state"]["waiting"]["reason"] == "ContainerCreating"
    apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late"}})
    eventually(lambda: container("p").get("ready"))


def test_a_missing_variable_says_why_and_is_tried_again(
    apply: Objects, make_pod: Objects, container: Objects, eventually: Objects
) -> None:
    reference = {"name": "late", "key": "k"}
    env = {"env": [{"name": "A", "valueFrom": {"secretKeyRef": reference}}]}
    apply(make_pod("p", container=env))
    waiting = eventually(
        lambda: (w := container("p").get("state", {}).get("waiting", {})).get("message") and w
    )
    assert waiting["reason"] == "CreateContainerConfigError"
    assert waiting["message"] == 'secret "late" not found'
    apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late"},
           "stringData": {"k": "v"}})  # fmt: skip
    eventually(lambda: container("p").get("ready"))


def test_the_service_account_token_works_in_the_pod(
    run: Objects, kubectl: Kubectl, namespace: str
) -> None:
    script = """
import json, os, ssl, urllib.request
home = "/var/run/secrets/kubernetes.io/serviceaccount"
token = open(f"{home}/token").read()
host = os.environ["KUBERNETES_SERVICE_HOST"] + ":" + os.environ["KUBERNETES_SERVICE_PORT"]
body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
request = urllib.request.Request(
    f"https://{host}/apis/authentication.k8s.io/v1/selfsubjectreviews",
    json.dumps(body).encode(),
    {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
)
context = ssl.create_default_context(cafile=f"{home}/ca.crt")
print(urllib.request.urlopen(request, context=context).read().decode())
"""
    pod = run("p")
    answer = json.loads(kubectl("exec", "p", "-n", namespace, "--", "python", "-c", script))
    user = answer["status"]["userInfo"]
    assert user["username"] == f"system:serviceaccount:{namespace}:default"
    assert user["extra"]["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]
    files = kubectl("exec", "p", "-n", namespace, "--", "ls", "/var/run/secrets/kubernetes.io/")
    assert files.split() == ["serviceaccount"]


def test_cpu_limits_hold(run: Objects, cluster: Running, namespace: str) -> None:
    if not any(os.access(path, os.W_OK) for path in CPU_HIERARCHIES):
        pytest.skip("this machine has no cgroup hierarchy for CPU that we may write")
    burn = {"command": ["python", "-c", "while True: pass"]}
    run("p", container={**burn, "resources": {"limits": {"cpu": "200m"}, "requests": {"cpu": "0"}}})
    process = psutil.Process(cluster.container(namespace, "p", "c").pid)
    before_s, begun_s = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(3)
    share = (sum(process.cpu_times()[:2]) - before_s) / (time.monotonic() - begun_s)
    assert 0.02 < share < 0.25
