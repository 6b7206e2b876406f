"""How pods start on a node agent: images, init containers, sidecars, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.running import KubectlError

Kubectl = Callable[..., str]
Objects = Callable[..., Any]
Pod = dict[str, Any]


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
    eventually(lambda: container("p").get("ready"))
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
