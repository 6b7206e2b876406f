"""A cluster with an autoscaled fleet of paced pods, and the Prometheus that its operator asks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from tandem.cluster.running import KubectlError, Running
from tandem_runtime import contract
from tandem_runtime.protocol import PodState

from benchmarks.beside import Beside
from benchmarks.fleet import NAMESPACE, READY_TIMEOUT_S
from benchmarks.prometheus.server import PrometheusServer, Target

NAME: Final = "chat"
PACE: Final = "mi300x:llama-3.1-70b"
MAX_RUNNING: Final = 4
"""Streams of a pod, so that a load that this machine can carry takes several of them."""
TTFT_S: Final = 1.0
TPOT_S: Final = 0.06
IDLE_S: Final = 45
OPERATOR: Final = ("--namespace=tandem-system", "deployment/tandem-operator")
POLICY: Final = {
    "windows": {
        "loadSeconds": 20,
        "holdSeconds": 30,
        "idleSeconds": IDLE_S,
        "startupSeconds": 15,
    },
    "steps": {"scaleIn": {"replicas": 1, "percent": 50, "intervalSeconds": 10}},
}


def bodies(uri: str) -> list[dict[str, Any]]:
    """Model, policy and fleet."""
    container = {
        "name": contract.CONTAINER,
        "args": ["--pace", PACE, "--max-running", str(MAX_RUNNING)],
    }
    pool = {
        "accelerator": {"resource": "nvidia.com/gpu", "count": 1},
        "template": {"spec": {"containers": [container]}},
        "scaling": {"minReplicas": 0, "maxReplicas": 8, "policyRef": {"name": NAME}},
    }
    objectives = {
        "timeToFirstToken": {"targetMilliseconds": round(1000 * TTFT_S)},
        "timePerOutputToken": {"targetMilliseconds": round(1000 * TPOT_S)},
    }
    source = {"source": {"uri": uri}, "servedNames": [NAME], "dtype": "bfloat16"}
    fleet = {
        "modelRef": {"name": NAME},
        "prefill": pool,
        "decode": pool,
        "objectives": objectives,
    }
    specs = (("Model", source), ("ScalingPolicy", POLICY), ("InferenceFleet", fleet))
    return [
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": NAME},
            "spec": spec,
        }
        for kind, spec in specs
    ]


@dataclass(frozen=True)
class Scene:
    """The fleet, seen through kubectl."""

    running: Running

    def kubectl(self, *arguments: str, input: str | None = None, timeout_s: float = 60.0) -> str:
        """In the fleet's namespace, as cluster-admin."""
        return self.running.kubectl(
            f"--namespace={NAMESPACE}", *arguments, input=input, timeout_s=timeout_s
        )

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "--output=json"))

    def serve(self, uri: str) -> str:
        """Applies everything, waits until the fleet is Ready; its URL."""
        bundle = {"apiVersion": "v1", "kind": "List", "items": bodies(uri)}
        self.kubectl("apply", "-f", "-", input=json.dumps(bundle))
        self.kubectl(
            "wait",
            "--for=condition=Ready",
            f"inferencefleet/{NAME}",
            f"--timeout={READY_TIMEOUT_S:.0f}s",
            timeout_s=READY_TIMEOUT_S + 10,
        )
        time.sleep(1.0)
        url: str = self.get(f"inferencefleet/{NAME}")["status"]["url"]
        return url

    def ask_prometheus(self, url: str) -> None:
        """From now on the operator does."""
        self.running.kubectl("set", "env", *OPERATOR, f"TANDEM_PROMETHEUS_URL={url}")
        rollout = ("rollout", "status", *OPERATOR, "--timeout=300s")
        self.running.kubectl(*rollout, timeout_s=310)

    def restart_operator(self) -> None:
        """Its pod is deleted; returns at once."""
        selector = "--selector=app.kubernetes.io/component=operator"
        self.running.kubectl("delete", "pod", OPERATOR[0], selector, "--wait=false")

    def sizes(self) -> dict[str, int]:
        """What each pool is to have, by role."""
        pools = self.get("pools")["items"]
        return {p["spec"]["role"]: int(p["spec"]["replicas"]) for p in pools}

    def scaling(self) -> tuple[str, str, str]:
        """Status, reason and message of ScalingActive."""
        conditions = self.get(f"inferencefleet/{NAME}")["status"]["conditions"]
        found = next((c for c in conditions if c["type"] == "ScalingActive"), None)
        return (found["status"], found["reason"], found["message"]) if found else ("", "", "")

    def wait(self, look: Callable[[], bool], timeout_s: float) -> float | None:
        """After how many seconds it came true; None: not in time."""
        begun_s = time.monotonic()
        while not look():
            if time.monotonic() - begun_s > timeout_s:
                return None
            time.sleep(0.5)
        return time.monotonic() - begun_s


@dataclass(frozen=True)
class Look:
    """The fleet at one moment, on the monotonic clock."""

    at_s: float
    sizes: dict[str, int]
    ready: dict[str, int]
    running: dict[str, int]
    """Streams by decode pod, those that leave included."""
    leaving: frozenset[str]
    startups_s: dict[str, float] = field(default_factory=dict)
    """From creation to Ready, by pod."""


class Watcher(Beside):
    """Looks once a second, and tells Prometheus which pods there are."""

    def __init__(self, scene: Scene, prometheus: PrometheusServer) -> None:
        super().__init__(self._watch)
        self._scene, self._prometheus = scene, prometheus
        self.looks: list[Look] = []

    def _watch(self) -> None:
        with httpx.Client(timeout=5.0) as http:
            while not self.stop.wait(1.0):
                try:
                    self.looks.append(self._look(http))
                except (KubectlError, OSError) as error:
                    print(f"# a look failed: {error}", flush=True)

    def _look(self, http: httpx.Client) -> Look:
        pods = [p for p in self._scene.get("pods")["items"] if p["status"].get("podIP")]
        self._prometheus.scrape(
            Target(f"{p['status']['podIP']}:{contract.HTTP_PORT}", NAMESPACE, name_of(p))
            for p in pods
            if label(p, contract.LABEL_COMPONENT) in SCRAPED
        )
        runtime = [p for p in pods if label(p, contract.LABEL_COMPONENT) == RUNTIME]
        decode = [p for p in runtime if label(p, contract.LABEL_ROLE) == contract.Role.DECODE]
        return Look(
            at_s=time.monotonic(),
            sizes=self._scene.sizes(),
            ready={
                role: sum(
                    ready_at(p) is not None and not leaves(p)
                    for p in runtime
                    if label(p, contract.LABEL_ROLE) == role
                )
                for role in (contract.Role.PREFILL, contract.Role.DECODE)
            },
            running={
                name_of(p): streams
                for p in decode
                if (streams := _streams(http, p["status"]["podIP"])) is not None
            },
            leaving=frozenset(name_of(p) for p in decode if leaves(p)),
            startups_s={
                name_of(p): at - _time(p["metadata"]["creationTimestamp"])
                for p in runtime
                if (at := ready_at(p)) is not None
            },
        )


RUNTIME: Final = contract.COMPONENT_RUNTIME
SCRAPED: Final = (contract.COMPONENT_RUNTIME, contract.COMPONENT_GATEWAY)


def name_of(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def label(pod: dict[str, Any], key: str) -> str:
    return str(pod["metadata"].get("labels", {}).get(key, ""))


def leaves(pod: dict[str, Any]) -> bool:
    """Whether it drains, or is being deleted."""
    meta = pod["metadata"]
    draining = contract.ANNOTATION_DRAINING in meta.get("annotations", {})
    return draining or "deletionTimestamp" in meta


def ready_at(pod: dict[str, Any]) -> float | None:
    """Since when it is Ready, as Unix time."""
    for condition in pod["status"].get("conditions", ()):
        if condition["type"] == "Ready" and condition["status"] == "True":
            return _time(condition["lastTransitionTime"])
    return None


def _time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _streams(http: httpx.Client, address: str) -> int | None:
    """That a pod has; None: it does not answer."""
    url = f"http://{address}:{contract.HTTP_PORT}{contract.PATH_STATE}"
    try:
        state = msgspec.json.decode(http.get(url).content, type=PodState)
    except (httpx.HTTPError, msgspec.DecodeError):
        return None
    return state.in_flight


def busier_than_least(looks: Sequence[Look]) -> list[int]:
    """Of each decode pod that began to leave: how many streams more it had, a look before, than the
    one with the fewest."""
    found = []
    for before, now in pairwise(looks):
        chosen = now.leaving - before.leaving
        stayed = {n: s for n, s in before.running.items() if n not in before.leaving}
        found += [stayed[name] - min(stayed.values()) for name in chosen if name in stayed]
    return found


def start_prometheus(binary: Path, folder: Path) -> PrometheusServer:
    """It answers already."""
    server = PrometheusServer(binary, folder)
    server.start()
    return server
