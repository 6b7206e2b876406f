"""A node agent does a kubelet's part: each test is something that a user of Kubernetes expects."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from tandem.cluster.process import is_running
from tandem.cluster.running import KubectlError, Running

Kubectl = Callable[..., str]
Objects = Callable[..., Any]
Pod = dict[str, Any]

READY = "--for=condition=Ready"
CPU_HIERARCHIES = ("/sys/fs/cgroup/cgroup.subtree_control", "/sys/fs/cgroup/cpu")


@pytest.fixture
def run(
    apply: Objects, kubectl: Kubectl, namespace: str, make_pod: Objects, get: Objects
) -> Callable[..., Pod]:
    """`run(name, script, ...)` applies `make_pod(...)`, waits until it is Ready, returns it."""

    def run_pod(name: str, *arguments: Any, **changes: Any) -> Pod:
        apply(make_pod(name, *arguments, **changes))
        kubectl("wait", f"pod/{name}", READY, "-n", namespace, "--timeout=30s")
        pod: Pod = get("pod", name)
        return pod

    return run_pod


@pytest.fixture
def phase(get: Objects) -> Callable[[str], str]:
    """The phase of a pod."""
    return lambda name: str(get("pod", name)["status"]["phase"])


@pytest.fixture
def container(get: Objects) -> Callable[..., Pod]:
    """The status of a pod's container."""

    def status(name: str, container: str = "c") -> Pod:
        pod = get("pod", name)["status"]
        entries = [
            *(pod.get("initContainerStatuses") or []),
            *(pod.get("containerStatuses") or []),
        ]
        found: Pod = next((entry for entry in entries if entry["name"] == container), {})
        return found

    return status


@pytest.fixture
def reasons(kubectl: Kubectl, namespace: str) -> Callable[[str], dict[str, str]]:
    """The Events about a pod: reason to its latest message."""

    def read(name: str) -> dict[str, str]:
        selector = f"--field-selector=involvedObject.name={name}"
        events = json.loads(kubectl("get", "events", "-n", namespace, selector, "-o", "json"))
        return {event["reason"]: event["message"] for event in events["items"]}

    return read


@pytest.fixture
def logs(kubectl: Kubectl, namespace: str) -> Callable[..., str]:
    """`kubectl logs` of a pod."""
    return lambda *arguments: kubectl("logs", "-n", namespace, *arguments)


# -- logs and exec --------------------------------------------------------------------------


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


# -- environment and volumes ----------------------------------------------------------------


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
    eventually(lambda: cat("/etc/info/app") == "renamed", timeout_s=10)
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


# -- starting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("nginx:1.27", 'image "nginx:1.27" is not on this node and nothing is pulled'),
        ("tandem.dev/runtime:9.9.9", "has another version than this node"),
    ],
)
def test_a_foreign_image_waits_with_a_sentence(
    apply: Objects, make_pod: Objects, container: Objects, eventually: Objects, image: str,
    sentence: str, reasons: Objects, kubectl: Kubectl, namespace: str,
) -> None:  # fmt: skip
    apply(make_pod("p", container={"image": image}))
    waiting = eventually(
        lambda: (w := container("p").get("state", {}).get("waiting", {})).get("message") and w
    )
    assert waiting["reason"] in ("ErrImagePull", "ImagePullBackOff")
    assert sentence in waiting["message"]
    assert "Failed" in reasons("p")
    with pytest.raises(KubectlError, match="is waiting to start"):
        kubectl("logs", "p", "-n", namespace)


def test_another_image_is_taken_at_once(
    apply: Objects, make_pod: Objects, kubectl: Kubectl, namespace: str, container: Objects,
    eventually: Objects,
) -> None:  # fmt: skip
    """The image is the one thing of a running container that can be changed in place."""
    apply(make_pod("p", container={"image": "nginx"}))
    eventually(lambda: container("p").get("state", {}).get("waiting", {}).get("message"))
    kubectl("set", "image", "pod/p", "c=tandem.dev/runtime:0.1.0", "-n", namespace)
    eventually(lambda: container("p").get("ready"), timeout_s=5)
    kubectl("set", "image", "pod/p", "c=tandem.dev/operator:0.1.0", "-n", namespace)
    eventually(lambda: container("p")["restartCount"] == 1)
    eventually(lambda: container("p")["image"] == "tandem.dev/operator:0.1.0")


def test_a_program_that_does_not_exist(
    apply: Objects, make_pod: Objects, container: Objects, eventually: Objects
) -> None:
    apply(make_pod("p", container={"command": ["no-such-program"]}))
    state = eventually(lambda: container("p").get("lastState", {}).get("terminated"))
    assert (state["reason"], state["exitCode"]) == ("StartError", 128)
    assert state["message"] == 'exec: "no-such-program": executable file not found in $PATH'


def test_init_containers_and_sidecars(
    run: Objects, logs: Objects, container: Objects, kubectl: Kubectl, namespace: str
) -> None:
    mount = {
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        "image": "tandem.dev/runtime:0.1.0",
    }

    def init(name: str, script: str, **more: Any) -> Pod:
        return {"name": name, "command": ["sh", "-c", script], **mount, **more}

    run(
        "p",
        "cat /v/order; exec sleep 600",
        mount,
        volumes=[{"name": "v", "emptyDir": {}}],
        initContainers=[
            init("one", "sleep 0.3; echo one >> /v/order"),
            init("side", "echo side >> /v/order; touch /v/up; exec sleep 600",
                 restartPolicy="Always",
                 startupProbe={"exec": {"command": ["test", "-e", "/v/up"]}, "periodSeconds": 1}),
            init("two", "echo two >> /v/order"),
        ],
    )  # fmt: skip
    assert logs("p", "-c", "c").split() == ["one", "side", "two"]
    assert container("p", "one")["state"]["terminated"]["reason"] == "Completed"
    assert "running" in container("p", "side")["state"]
    kubectl("delete", "pod", "p", "-n", namespace, "--timeout=20s")


def test_refusals_of_the_node_itself(
    apply: Objects, make_pod: Objects, get: Objects, eventually: Objects
) -> None:
    """A pod that names its node passes the scheduler by; the node has the last word."""
    nine = {"resources": {"limits": {"nvidia.com/gpu": "9"}}}
    apply(
        make_pod("many", container=nine, nodeName="node-1"),
        make_pod("other", nodeName="node-1", nodeSelector={"tandem.dev/rack": "rack-2"}),
    )

    def failed(name: str) -> Pod | None:
        status: Pod = get("pod", name)["status"]
        return status if status["phase"] == "Failed" else None

    many = eventually(lambda: failed("many"))
    assert many["reason"] == "OutOfnvidia.com/gpu"
    assert "requested: 9" in many["message"]
    assert eventually(lambda: failed("other"))["reason"] == "NodeAffinity"


# -- probes ---------------------------------------------------------------------------------


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


# -- ending and restarting ------------------------------------------------------------------


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
    eventually(lambda: not is_running(process), timeout_s=10)


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
