from __future__ import annotations

from tandem.agent.config import AgentConfig, Gpu
from tandem.agent.node import Machine, capacity, labels, speaks_well, status, with_transitions

NOW_S = 1_700_000_000.0
NOW = "2023-11-14T22:13:20Z"
MACHINE = Machine(2, 8 * 2**30, "6.1", "Debian", "boot", "machine")


def config(gpus: int = 8) -> AgentConfig:
    return AgentConfig(
        node="node-1",
        node_ip="127.65.1.1",
        pod_network="127.65.1.0/24",
        port=10250,
        labels={"tandem.dev/rack": "rack-1"},
        gpus=tuple(Gpu(index, "Pretended") for index in range(gpus)),
        folder="",
        state_home="",
        api_host="127.65.0.1",
        api_port=6443,
        ca="",
        client_certificate="",
        client_key="",
        server_certificate="",
        server_key="",
        cluster="c",
        kubernetes_version="1.36.3",
    )


def test_capacity() -> None:
    assert capacity(config(), MACHINE) == {
        "cpu": "2",
        "memory": "8388608Ki",
        "pods": "110",
        "nvidia.com/gpu": "8",
    }
    assert "nvidia.com/gpu" not in capacity(config(gpus=0), MACHINE)


def test_labels() -> None:
    found = labels(config())
    assert found["kubernetes.io/hostname"] == "node-1"
    assert found["kubernetes.io/os"] == "linux"
    assert found["tandem.dev/rack"] == "rack-1"
    assert found["nvidia.com/gpu.product"] == "Pretended"


def test_transition_times() -> None:
    new = [{"type": "A", "status": "True"}, {"type": "B", "status": "True"}]
    old = [
        {"type": "A", "status": "True", "lastTransitionTime": "before"},
        {"type": "B", "status": "False", "lastTransitionTime": "before"},
    ]
    times = [c["lastTransitionTime"] for c in with_transitions(new, old, NOW_S)]
    assert times == ["before", NOW]


def test_a_sick_gpu_is_not_healed_by_a_report() -> None:
    """Whoever found it lowered allocatable; capacity stays what it is."""
    old = {"allocatable": {"nvidia.com/gpu": "7", "cpu": "2"}}
    new = status(config(), MACHINE, old, NOW_S)
    assert new["allocatable"]["nvidia.com/gpu"] == "7"
    assert new["capacity"]["nvidia.com/gpu"] == "8"
    assert new["allocatable"]["memory"] == "8388608Ki"


def test_only_own_conditions_are_reported() -> None:
    kinds = {c["type"] for c in status(config(), MACHINE, {}, NOW_S)["conditions"]}
    assert kinds == {"Ready", "MemoryPressure", "DiskPressure", "PIDPressure"}


def test_another_word_about_the_node_is_noticed() -> None:
    node = {"status": status(config(), MACHINE, {}, NOW_S)}
    assert speaks_well(node)
    foreign = {"type": "KernelDeadlock", "status": "True"}
    node["status"]["conditions"].append(foreign)
    assert speaks_well(node)
    for condition in node["status"]["conditions"]:
        if condition["type"] == "Ready":
            condition["status"] = "Unknown"
    assert not speaks_well(node)
    assert not speaks_well({})
