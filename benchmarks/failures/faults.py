"""What is done to the fleet, and what a person or the machine does about it afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tandem.cluster.process import ProcessId, send_signal
from tandem_runtime.contract import Role

from benchmarks.failures.scene import SYSTEM, Scene, kill
from benchmarks.fleet import NAMESPACE

Heal = Callable[[], None]
STOPPED_S: Final = 60.0
NODE_AWAY_S: Final = 150.0
"""Longer than it takes until the node counts as lost and its pods are replaced."""
DRAIN_TIMEOUT_S: Final = 300


@dataclass(frozen=True)
class Fault:
    """One way of failing."""

    name: str
    strike: Callable[[Scene], Heal]
    """Returns once it has happened; what it returns undoes what does not heal by itself."""
    lasts_s: float = 0.0
    """Until it is undone."""
    breaks_connections: bool = False
    """Whether clients' own connections end with it: those have to come back."""


def _nothing() -> None:
    """It heals by itself."""


def _stop(process: ProcessId) -> Heal:
    kill(process, signal.SIGSTOP)

    def wake() -> None:
        send_signal(process, signal.SIGCONT)

    return wake


def kill_decode_pod(scene: Scene) -> Heal:
    kill(scene.pod(Role.DECODE))
    return _nothing


def kill_prefill_pod(scene: Scene) -> Heal:
    kill(scene.pod(Role.PREFILL))
    return _nothing


def kill_node(scene: Scene) -> Heal:
    """The agent first, so that nobody reports what becomes of its pods."""
    node = scene.quiet_node()
    containers = scene.running.containers(node)
    kill(scene.running.process(node))
    for container in containers:
        send_signal(container, signal.SIGKILL)

    def boot() -> None:
        scene.running.revive()

    return boot


def stop_decode_pod(scene: Scene) -> Heal:
    return _stop(scene.pod(Role.DECODE))


def stop_agent(scene: Scene) -> Heal:
    return _stop(scene.running.process(scene.quiet_node()))


def drain_node(scene: Scene) -> Heal:
    """As an administrator does before maintenance; the node comes back afterwards."""
    node = scene.quiet_node()
    arguments = ("--ignore-daemonsets", "--delete-emptydir-data", "--force")
    scene.running.kubectl(
        "drain", node, *arguments, f"--timeout={DRAIN_TIMEOUT_S}s", timeout_s=DRAIN_TIMEOUT_S + 30
    )

    def uncordon() -> None:
        scene.running.kubectl("uncordon", node)

    return uncordon


def scale_in(scene: Scene) -> Heal:
    """One decode pod fewer until it has gone, then as many as before."""
    scene.patch({"spec": {"decode": {"replicas": scene.decode - 1}}})

    def scale_out() -> None:
        scene.patch({"spec": {"decode": {"replicas": scene.decode}}})

    return scale_out


def roll_out(scene: Scene) -> Heal:
    """Both pools get another template: every pod is replaced."""
    container = {"name": "runtime", "env": [{"name": "ROLLED_OUT", "value": "1"}]}
    template = {"template": {"spec": {"containers": [container]}}}
    scene.patch({"spec": {"prefill": template, "decode": template}})
    return _nothing


def kill_operator(scene: Scene) -> Heal:
    name = scene.first("operator", SYSTEM)
    kill(scene.running.container(SYSTEM, name, "operator"))
    return _nothing


def stop_api_server(scene: Scene) -> Heal:
    return _stop(scene.running.process("kube-apiserver"))


def kill_gateway(scene: Scene) -> Heal:
    name = scene.first("gateway", NAMESPACE)
    kill(scene.running.container(NAMESPACE, name, "gateway"))
    return _nothing


FAULTS: Final = (
    Fault("SIGKILL a decode pod", kill_decode_pod),
    Fault("SIGKILL a prefill pod", kill_prefill_pod),
    Fault("SIGKILL a node: its agent and pods", kill_node, NODE_AWAY_S),
    Fault("SIGSTOP a decode pod for 60 s", stop_decode_pod, STOPPED_S),
    Fault("SIGSTOP a node's agent for 60 s", stop_agent, STOPPED_S),
    Fault("kubectl drain", drain_node),
    Fault("scale-in", scale_in, 30.0),
    Fault("rollout", roll_out),
    Fault("SIGKILL the operator", kill_operator),
    Fault("SIGSTOP kube-apiserver for 60 s", stop_api_server, STOPPED_S),
    Fault("SIGKILL a gateway replica", kill_gateway, breaks_connections=True),
)
