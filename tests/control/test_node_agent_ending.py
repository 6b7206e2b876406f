"""How pods end on a node agent, and how they are started again."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.process import is_running
from tandem.cluster.running import Running

Kubectl = Callable[..., str]
Objects = Callable[..., Any]
Pod = dict[str, Any]


def test_crash_loop_and_termination_message(
    apply: Objects, make_pod: Objects, container: Objects, eventually: Objects, reasons: Objects
) -> None:
    apply(make_pod("p", "printf 'because of X' > /dev/termination-log; exit 9"))

    def crash_looping() -> Pod | None:
        entry: Pod = container("p")
        waiting = entry.get("state", {}).get("waiting", {})
        return entry if waiting.get("reason") == "CrashLoopBackOff" else None

    entry = eventually(crash_looping)
    assert entry["restartCount"] == 1
    assert "back-off 10s restarting failed container=c" in entry["state"]["waiting"]["message"]
    last = entry["lastState"]["terminated"]
    assert (last["exitCode"], last["message"], last["reason"]) == (9, "because of X", "Error")
    assert "BackOff" in reasons("p")
    assert eventually(lambda: container("p")["restartCount"] == 2, timeout_s=15)


@pytest.mark.parametrize(
    ("policy", "code", "final"),
    [("Never", 0, "Succeeded"), ("Never", 3, "Failed"), ("OnFailure", 0, "Succeeded")],
)
def test_pods_that_end(
    apply: Objects, make_pod: Objects, phase: Objects, container: Objects, eventually: Objects,
    policy: str, code: int, final: str, logs: Objects,
) -> None:  # fmt: skip
    apply(make_pod("p", f"echo done; exit {code}", restartPolicy=policy))
    eventually(lambda: phase("p") == final)
    assert container("p")["state"]["terminated"]["exitCode"] == code
    assert container("p")["restartCount"] == 0
    assert logs("p") == "done\n"


def test_an_active_deadline(
    apply: Objects, make_pod: Objects, get: Objects, phase: Objects, eventually: Objects
) -> None:
    apply(make_pod("p", activeDeadlineSeconds=2))
    eventually(lambda: phase("p") == "Failed")
    assert get("pod", "p")["status"]["reason"] == "DeadlineExceeded"


def test_graceful_end(
    run: Objects, kubectl: Kubectl, namespace: str, cluster: Running, tmp_path: Any
) -> None:
    tmp_path.chmod(0o777)
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo hook >> /out/order; sleep 0.5"]}}}
    script = (
        "trap 'echo term >> /out/order; exit 0' TERM; touch /out/up; while :; do sleep 0.05; done"
    )
    up = {"exec": {"command": ["test", "-e", "/out/up"]}, "periodSeconds": 1}
    mounts = [{"name": "out", "mountPath": "/out"}]
    run(
        "p",
        script,
        {"lifecycle": hook, "volumeMounts": mounts, "readinessProbe": up},
        volumes=[{"name": "out", "hostPath": {"path": str(tmp_path)}}],
        terminationGracePeriodSeconds=20,
    )
    process = cluster.container(namespace, "p", "c")
    begun_s = time.monotonic()
    kubectl("delete", "pod", "p", "-n", namespace)
    assert 0.4 < time.monotonic() - begun_s < 6
    assert (tmp_path / "order").read_text() == "hook\nterm\n"
    assert not is_running(process)


STUBBORN = "trap '' TERM; touch /tmp/up; while :; do sleep 0.05; done"
UP = {"readinessProbe": {"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1}}


def test_the_grace_period_ends_with_sigkill(
    run: Objects, kubectl: Kubectl, namespace: str, cluster: Running
) -> None:
    run("p", STUBBORN, UP, terminationGracePeriodSeconds=3)
    process = cluster.container(namespace, "p", "c")
    begun_s = time.monotonic()
    kubectl("delete", "pod", "p", "-n", namespace)
    assert 2.5 < time.monotonic() - begun_s < 8
    assert not is_running(process)


def test_a_second_delete_shortens_the_grace_period(
    run: Objects, kubectl: Kubectl, namespace: str, cluster: Running, eventually: Objects,
    get: Objects,
) -> None:  # fmt: skip
    run("p", STUBBORN, UP, terminationGracePeriodSeconds=300)
    process = cluster.container(namespace, "p", "c")
    kubectl("delete", "pod", "p", "-n", namespace, "--wait=false")
    time.sleep(1)
    assert is_running(process)
    begun_s = time.monotonic()
    kubectl("delete", "pod", "p", "-n", namespace, "--grace-period=2")
    assert time.monotonic() - begun_s < 8
    assert not is_running(process)


def test_a_forced_delete_ends_the_processes(
    run: Objects, kubectl: Kubectl, namespace: str, cluster: Running, eventually: Objects
) -> None:
    run("p", STUBBORN, UP, terminationGracePeriodSeconds=300)
    process = cluster.container(namespace, "p", "c")
    kubectl("delete", "pod", "p", "-n", namespace, "--grace-period=0", "--force")
    eventually(lambda: not is_running(process))


def test_a_pod_that_waits_can_be_deleted(
    apply: Objects, make_pod: Objects, kubectl: Kubectl, namespace: str, container: Objects,
    eventually: Objects,
) -> None:  # fmt: skip
    apply(
        make_pod("image", container={"image": "nginx"}),
        make_pod("volume", volumes=[{"name": "v", "secret": {"secretName": "no"}}]),
    )
    eventually(lambda: container("image").get("state") and container("volume").get("state"))
    kubectl("delete", "pod", "image", "volume", "-n", namespace, "--timeout=10s")


def test_conditions_of_others_are_kept(
    run: Objects, kubectl: Kubectl, namespace: str, get: Objects, eventually: Objects
) -> None:
    probe = {"exec": {"command": ["test", "-e", "/tmp/ok"]}, "periodSeconds": 1,
             "failureThreshold": 1}  # fmt: skip
    run("p", "touch /tmp/ok; exec sleep 600", {"readinessProbe": probe})
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    foreign = {"type": "DisruptionTarget", "status": "True", "reason": "Test", "message": "kept",
               "lastTransitionTime": now}  # fmt: skip
    patch = json.dumps({"status": {"conditions": [foreign]}})
    kubectl("patch", "pod", "p", "-n", namespace, "--subresource=status", "-p", patch)
    kubectl("exec", "p", "-n", namespace, "--", "rm", "/tmp/ok")

    def conditions() -> dict[str, str]:
        return {c["type"]: c["status"] for c in get("pod", "p")["status"]["conditions"]}

    eventually(lambda: conditions()["Ready"] == "False")
    assert conditions()["DisruptionTarget"] == "True"
    assert conditions()["PodScheduled"] == "True"


def test_a_deployment_rolls_out(
    apply: Objects, kubectl: Kubectl, namespace: str, make_pod: Objects
) -> None:
    pod = make_pod("web")
    template = {"metadata": {"labels": {"app": "web"}}, "spec": pod["spec"]}
    spec = {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template}
    apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
           "spec": spec})  # fmt: skip
    status = ("rollout", "status", "deployment/web", "-n", namespace, "--timeout=30s")
    kubectl(*status)
    kubectl("rollout", "restart", "deployment/web", "-n", namespace)
    kubectl(*status)
