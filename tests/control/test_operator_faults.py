"""The operator killed, stopped and restarted on a real control plane."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleets import Fleets, eventually, fleet, model
from operator_process import OperatorProcess, kubeconfig, no_deployment
from tandem.cluster.process import send_signal
from tandem.cluster.running import NotRunningError, Running

pytestmark = pytest.mark.usefixtures("operator")

KILLS = 10
SEED = 20_261_123


@pytest.fixture
def fleets(cluster: Running, namespace: str) -> Fleets:
    return Fleets(cluster, namespace)


def end_state(fleets: Fleets) -> dict[str, Any]:
    """Everything that the operator made, without names and addresses that may differ."""
    fleets.wait_ready()
    eventually(lambda: len(fleets.pods(terminating=True)) == 3)
    pods = []
    for pod in fleets.pods(terminating=True):
        meta, container = pod["metadata"], pod["spec"]["containers"][0]
        env = [e for e in container["env"] if "value" in e]
        pods.append([meta["labels"], sorted(meta["annotations"]), container["args"], env])
    status = fleets.get("inferencefleet/chat")["status"]
    conditions = {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}
    return {
        "pods": sorted(pods, key=str),
        "pools": sorted(
            [p["metadata"]["name"], p["spec"], p["status"]["readyReplicas"]]
            for p in fleets.get("pools")["items"]
        ),
        "revisions": sorted(
            [r["metadata"]["name"], r["revision"]]
            for r in fleets.get("controllerrevisions", "-l=tandem.dev/fleet=chat")["items"]
        ),
        "budgets": sorted(b["metadata"]["name"] for b in fleets.get("pdb")["items"]),
        "conditions": conditions,
        "revision": status["revision"],
    }


@pytest.fixture
def process(cluster: Running, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator process instead of the Deployment's."""
    log = tmp_path / "operator.log"
    log.touch()
    with no_deployment(cluster):
        process = OperatorProcess(kubeconfig(cluster, tmp_path), log, "first")
        yield process
        process.kill()


def test_killed_at_ten_random_moments_of_a_rollout(
    fleets: Fleets, process: OperatorProcess
) -> None:
    process.start()
    fleets.apply(model(), fleet())
    fleets.wait_ready()
    fleets.roll("2")
    undisturbed = end_state(fleets)
    fleets.roll("1")
    fleets.wait_ready()
    fleets.roll("3")
    fleets.wait_ready()

    chance = random.Random(SEED)
    process.kill()
    fleets.roll("2")
    for _ in range(KILLS):
        process.start()
        process.wait_leading()
        time.sleep(chance.uniform(0.0, 1.2))
        process.kill()
        assert len(fleets.ready("chat-decode")) >= 2
    process.start()
    disturbed = end_state(fleets)
    # The history is longer by what was rolled in between; all else is the same.
    undisturbed.pop("revisions")
    newest = disturbed.pop("revisions")
    assert disturbed == undisturbed
    serving = disturbed["revision"]["serving"]
    numbers = {name: number for name, number in newest if "decode" in name}
    assert max(numbers, key=lambda name: numbers[name]) == f"chat-decode-{serving}"


def test_a_killed_container_comes_back_and_goes_on(fleets: Fleets, cluster: Running) -> None:
    fleets.apply(model(), fleet())
    fleets.wait_ready()
    pod = fleets.operator_pod()
    killed = cluster.container("tandem-system", pod, "operator")
    send_signal(killed, signal.SIGKILL)
    fleets.roll("2")
    fleets.wait_ready()
    assert len(fleets.revisions()) == 1
    again = cluster.container("tandem-system", fleets.operator_pod(), "operator")
    assert again != killed


def test_only_one_leads_and_a_stopped_leader_ends_when_it_wakes(
    fleets: Fleets, cluster: Running, process: OperatorProcess, tmp_path: Path
) -> None:
    process.start()
    process.wait_leading()
    log = tmp_path / "second.log"
    log.touch()
    second = OperatorProcess(kubeconfig(cluster, tmp_path), log, "second")
    second.start()
    try:
        fleets.apply(model(), fleet())
        fleets.wait_ready()
        assert "leading as" not in log.read_text()
        process.send(signal.SIGSTOP)
        second.wait_leading(timeout_s=40.0)
        fleets.roll("2")
        fleets.wait_ready()
        process.send(signal.SIGCONT)
        assert process.wait_end() == 1, "it went on without the lease"
        second.send(signal.SIGTERM)
        assert second.wait_end() == 0
        lease = cluster.kubectl(
            "get", "lease/tandem-operator", "-n=tandem-system", "-o=jsonpath={.spec}"
        )
        assert '"holderIdentity":""' in lease, "a lease that is given up is free at once"
    finally:
        second.kill()


def test_the_api_server_away_for_a_while(fleets: Fleets, cluster: Running) -> None:
    fleets.apply(model(), fleet())
    fleets.wait_ready()
    apiserver = cluster.process("kube-apiserver")
    send_signal(apiserver, signal.SIGSTOP)
    try:
        time.sleep(20)
    finally:
        send_signal(apiserver, signal.SIGCONT)
    fleets.roll("2")
    fleets.wait_ready()
    with pytest.raises(NotRunningError):
        cluster.container("tandem-system", "nobody", "operator")
