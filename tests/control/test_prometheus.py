"""Autoscaled Pools whose load a real Prometheus scrapes, and everything that one can do wrong."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleets import Body, Fleets, Said, eventually, model, pool
from operator_process import OperatorProcess, kubeconfig, no_deployment
from tandem.cluster.running import Running

from benchmarks.prometheus.server import PrometheusServer, Target

OBJECTIVES = {"timePerOutputToken": {"targetMilliseconds": 25}}
"""68 streams of a stand-in keep it."""
RUNNING = "vllm:num_requests_running"
JOBS = ("pods", "again")
"""Two jobs that find the same pods, as happens where there are two PodMonitors."""
UNUSABLE = {
    "several": (
        f'{RUNNING}{{pod=~"$pool-.*"}}',
        "QueryUnusable",
        "runningRequests of Pool several-decode: its query returns 2 series where one is needed; "
        "wrap it in sum() or max()",
    ),
    "none": (
        "sum(no_such_metric)",
        "QueryUnusable",
        "its query returns no series; see whether Prometheus scrapes the pods",
    ),
    "match": (
        f"sum({RUNNING} * on (namespace) vllm:num_requests_waiting)",
        "PrometheusFailed",
        "refuses the query: ",
    ),
    "nan": ("", "QueryUnusable", "runningRequests of Pool nan-decode: its query returns nan"),
}
"""By fleet: its policy's own query, and what ScalingActive says of it."""


@pytest.fixture(scope="module")
def prometheus(
    prometheus_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrometheusServer]:
    server = PrometheusServer(prometheus_binary, tmp_path_factory.mktemp("prometheus"), JOBS)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def process(
    cluster: Running,
    operator: None,
    prometheus: PrometheusServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OperatorProcess]:
    """An operator whose settings name that Prometheus."""
    folder = tmp_path_factory.mktemp("operator")
    log = folder / "operator.log"
    log.touch()
    with no_deployment(cluster):
        process = OperatorProcess(
            kubeconfig(cluster, folder),
            log,
            "measured",
            TANDEM_PROMETHEUS_URL=prometheus.url,
            TANDEM_SCALING_INTERVAL_S="1",
            # Nobody starts it again where a busy machine lets its lease run out.
            TANDEM_LEASE_DURATION_S="600",
        )
        process.start()
        process.wait_leading()
        yield process
        # It gives its lease up.
        process.send(signal.SIGTERM)
        process.wait_end()


@pytest.fixture
def fleets(cluster: Running, process: OperatorProcess, namespace: str) -> Iterator[Fleets]:
    fleets = Fleets(cluster, namespace)
    yield fleets
    fleets.end_streams()


def policy(name: str, promql: str = "") -> Body:
    spec: dict[str, Any] = {
        "windows": {"holdSeconds": 5},
        "steps": {"scaleIn": {"percent": 100, "intervalSeconds": 0}},
        "forecast": {"percent": 0},
    }
    if promql:
        spec["promql"] = {"runningRequests": promql}
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "ScalingPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


def alone(name: str, promql: str = "", least: int = 1) -> tuple[Body, ...]:
    """A model, a policy, and a fleet of one autoscaled pool."""
    scaling = {"minReplicas": least, "maxReplicas": 8, "policyRef": {"name": name}}
    decode = pool(None, STANDIN_WORK="1") | {"scaling": scaling}
    spec = {"modelRef": {"name": name}, "decode": decode, "objectives": OBJECTIVES}
    body = {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "InferenceFleet",
        "metadata": {"name": name},
        "spec": spec,
    }
    # Two fleets of one namespace do not serve one name.
    return model(name, servedNames=[name]), policy(name, promql), body


def scrape(prometheus: PrometheusServer, fleets: Fleets, *jobs: str) -> None:
    """From now on the runtime pods that there are, each by these jobs."""
    targets = [
        Target(f"{pod['status']['podIP']}:8000", fleets.namespace, pod["metadata"]["name"])
        for pod in fleets.pods()
    ]
    for job in JOBS:
        prometheus.scrape(targets if job in jobs else [], job)


def size(fleets: Fleets, name: str = "chat") -> int:
    return int(fleets.get(f"pool/{name}-decode")["spec"]["replicas"])


def scaled(fleets: Fleets) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fleets.get("pool/chat-decode")["status"]["scaling"]["decisions"]
    return found


def unusable(fleets: Fleets, name: str, sentence: str) -> Said | None:
    """What a fleet says of its scaling, once it is that."""
    said = fleets.condition("ScalingActive", f"inferencefleet/{name}")
    return said if sentence in said.sentence else None


def test_the_size_follows_prometheus_over_an_operators_death(
    fleets: Fleets, prometheus: PrometheusServer, process: OperatorProcess
) -> None:
    fleets.apply(*alone("chat"))
    fleets.wait_ready()
    (busy,) = fleets.names("chat-decode")
    scrape(prometheus, fleets, *JOBS)
    # What a step costs is the pod's own word, how many streams there are is Prometheus'.
    fleets.pretend_running(busy, 40)
    fleets.wait_condition("ScalingActive", "True", "Scaling", timeout_s=30)
    fleets.pretend_measured(busy, 120)
    eventually(lambda: size(fleets) == 3)
    eventually(lambda: len(fleets.ready("chat-decode")) == 3)
    before = scaled(fleets)

    process.kill()
    # From here on nothing can be learned: no step is taken any more.
    for pod in fleets.ready("chat-decode"):
        fleets.pretend_running(pod, 0)
    process.start()
    process.wait_leading()
    fleets.wait_condition("ScalingActive", "True", "Scaling", timeout_s=30)
    assert size(fleets) == 3
    fleets.pretend_measured(busy, 20)
    eventually(lambda: size(fleets) == 1)
    eventually(lambda: scaled(fleets)[-1]["reason"] == "LoadUnderBand")
    after = scaled(fleets)
    assert after[: len(before)] == before
    # Each pod was scraped twice, and counted once.
    assert max(decision["replicas"] for decision in after) == 3


def test_what_cannot_be_used_is_a_condition(fleets: Fleets, prometheus: PrometheusServer) -> None:
    for name, (promql, _, _) in UNUSABLE.items():
        fleets.apply(*alone(name, promql, least=2 if name == "several" else 1))
    for name in UNUSABLE:
        fleets.wait_ready(name)
    (nan,) = fleets.names("nan-decode")
    fleets.pretend_measured(nan, float("nan"))
    scrape(prometheus, fleets, JOBS[0])
    for name, (_, reason, sentence) in UNUSABLE.items():
        # At first there may be no rate yet: one needs two scrapes.
        said = eventually(lambda name=name, sentence=sentence: unusable(fleets, name, sentence))
        assert (said.status, said.reason) == ("False", reason)
        assert "the pool keeps its size" in said.sentence
        assert size(fleets, name) == (2 if name == "several" else 1)
    said = fleets.condition("ScalingActive", "inferencefleet/match")
    assert "found duplicate series for the match group" in said.sentence


def test_one_that_hangs_and_dies_and_comes_back(
    fleets: Fleets, prometheus: PrometheusServer
) -> None:
    fleets.apply(*alone("chat"))
    fleets.wait_ready()
    (busy,) = fleets.names("chat-decode")
    fleets.pretend_running(busy, 70)
    scrape(prometheus, fleets, JOBS[0])
    eventually(lambda: size(fleets) == 2)
    fleets.wait_condition("ScalingActive", "True", "Scaling", timeout_s=30)
    prometheus.send(signal.SIGSTOP)
    said = fleets.wait_condition("ScalingActive", "False", "PrometheusFailed", timeout_s=60)
    where = f"Prometheus at {prometheus.url} does not answer: "
    assert f"{where}it takes too long; the pool keeps its size" in said.sentence
    prometheus.stop()
    eventually(lambda: f"{where}the connection fails" in fleets.condition("ScalingActive").sentence)
    assert size(fleets) == 2
    prometheus.start()
    fleets.wait_condition("ScalingActive", "True", "Scaling", timeout_s=60)
    assert size(fleets) == 2
