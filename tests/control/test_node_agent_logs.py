"""`kubectl logs` and `kubectl exec` on a node agent's pods."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.running import KubectlError, Running

Kubectl = Callable[..., str]
Objects = Callable[..., Any]


def test_logs(run: Objects, logs: Objects, kubectl: Kubectl, namespace: str) -> None:
    run("p", "for i in 1 2 3; do echo line $i; done; echo err >&2; exec sleep 600")
    assert sorted(logs("p").splitlines()) == ["err", "line 1", "line 2", "line 3"]
    assert len(logs("p", "--tail=2").splitlines()) == 2
    assert logs("p", "--limit-bytes=4") == "line"
    assert logs("p", "--since=1h") == logs("p")
    stamp = logs("p", "--timestamps", "--tail=1").split()[0]
    assert stamp.startswith("20")
    assert stamp.endswith("Z")
    with pytest.raises(KubectlError, match="previous terminated container"):
        logs("p", "--previous")


def test_logs_follow_until_the_end(
    apply: Objects, make_pod: Objects, logs: Objects, phase: Objects, eventually: Objects
) -> None:
    script = "for i in 1 2 3 4; do echo $i; sleep 0.4; done"
    apply(make_pod("p", script, restartPolicy="Never"))
    eventually(lambda: phase("p") == "Running")
    assert logs("-f", "p").split() == ["1", "2", "3", "4"]
    eventually(lambda: phase("p") == "Succeeded")
    assert logs("p").split() == ["1", "2", "3", "4"]


def test_logs_of_the_previous_run(
    apply: Objects, make_pod: Objects, logs: Objects, container: Objects, eventually: Objects
) -> None:
    marker = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    script = "test -e /v/x && { echo second; exec sleep 600; }; touch /v/x; echo first; exit 1"
    apply(make_pod("p", script, marker, volumes=[{"name": "v", "emptyDir": {}}]))
    eventually(lambda: container("p").get("ready"))
    assert logs("p") == "second\n"
    assert logs("p", "--previous") == "first\n"


def test_exec(run: Objects, kubectl: Kubectl, namespace: str) -> None:
    run("p", container={"env": [{"name": "COLOUR", "value": "blue"}]})
    inside = ("exec", "p", "-n", namespace, "-i", "--")
    assert kubectl(*inside, "sh", "-c", "echo $COLOUR; hostname") == "blue\np\n"
    assert kubectl(*inside, "cat", input="from outside") == "from outside"
    big = "x" * 300_000
    assert kubectl(*inside, "cat", input=big) == big
    with pytest.raises(KubectlError, match="exit code 4"):
        kubectl(*inside, "sh", "-c", "exit 4")
    with pytest.raises(KubectlError, match="executable file not found"):
        kubectl(*inside, "no-such-program")


def test_exec_on_a_terminal(run: Objects, cluster: Running, namespace: str) -> None:
    run("p")
    command = (
        f"{cluster.kubectl_path} --kubeconfig={cluster.kubeconfig} exec p -n {namespace} -it -- "
        "sh -c 'test -t 0 && test -t 1 && echo on a terminal'"
    )
    answer = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert "on a terminal" in answer.stdout


def test_what_a_node_does_not_do_it_says(run: Objects, kubectl: Kubectl, namespace: str) -> None:
    run("p")
    with pytest.raises(KubectlError, match="use `kubectl logs -f` or `kubectl exec`"):
        kubectl("attach", "p", "-n", namespace)
    with pytest.raises(KubectlError, match="each pod listens on its own loopback address"):
        kubectl("port-forward", "pod/p", "0:80", "-n", namespace)
