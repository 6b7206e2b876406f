"""A fleet of paced pods on a cluster of its own, the policy, and the fault."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil
from tandem.agent.slowing import ANNOTATION_SLOW_PERCENT
from tandem.cluster.running import NotRunningError
from tandem_runtime import contract

from benchmarks.fleet import NAMESPACE, BenchFleet

POLL_S: Final = 1.0
STEADY_S: Final = 600.0
IN_REPAIR: Final = ("Draining", "Drained")


@dataclass(frozen=True)
class Pulled:
    """What became of a slow pod; monotonic times, None: it did not happen in time."""

    found_s: float | None
    pod: str
    """Which one was pulled out."""
    evidence: str
    gone_s: float | None


@dataclass(frozen=True)
class Scene:
    """One fleet of `size` pods."""

    fleet: BenchFleet
    size: int

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """In the fleet's namespace, as cluster-admin."""
        return self.fleet.running.kubectl(f"--namespace={NAMESPACE}", *arguments, input=input)

    def watch(self, percent: int, windows: int, window_s: int) -> None:
        """Sets the policy that pulls stragglers out."""
        signals = {
            "clearSeconds": 5,
            "stragglers": {"percent": percent, "windows": windows, "windowSeconds": window_s},
        }
        body = {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "NodeHealthPolicy",
            "metadata": {"name": "default"},
            "spec": {"mode": "Active", "signals": signals},
        }
        self.kubectl("apply", "-f", "-", input=json.dumps(body))

    def unwatch(self) -> None:
        """Removes the policy, and with it what it remembers of nodes."""
        self.kubectl("delete", "nodehealthpolicy", "default", "--ignore-not-found")

    def slow(self, pods: Sequence[str], percent: int) -> None:
        """Slows pods by so much; 0: not any more."""
        value = f"{ANNOTATION_SLOW_PERCENT}={percent}"
        self.kubectl("annotate", "--overwrite", "pod", *pods, value)

    def pods(self) -> list[tuple[str, str]]:
        """(name, address) of the pods, those that leave included."""
        return self.fleet.pods(contract.Role.BOTH)

    def phases(self) -> list[dict[str, Any]]:
        """What the policy's status says of nodes."""
        text = self.kubectl("get", "nodehealthpolicy", "default", "--output=json")
        found: list[dict[str, Any]] = json.loads(text).get("status", {}).get("nodes", [])
        return found

    def steady(self) -> bool:
        """Whether all pods are there and Ready, and none leaves."""
        selector = f"--selector={contract.LABEL_FLEET}={self.fleet.name}"
        items = json.loads(self.kubectl("get", "pods", selector, "--output=json"))["items"]
        ready = [
            any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"]["conditions"])
            for p in items
            if "deletionTimestamp" not in p["metadata"]
        ]
        return len(items) == len(ready) == self.size and all(ready)

    def wait(self, look: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it came true in time."""
        deadline_s = time.monotonic() + timeout_s
        while not look():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)
        return True

    def pulled(self, within_s: float) -> Pulled:
        """Waits until the policy pulls a pod out and it is gone."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [node for node in self.phases() if node["phase"] in IN_REPAIR]
            return bool(found)

        if not self.wait(look, within_s):
            return Pulled(None, "", "", None)
        found_s, evidence = time.monotonic(), str(found[0]["message"]).split(";")[0]
        pod = evidence.split(" on ")[0]
        gone = self.wait(lambda: pod not in dict(self.pods()) and self.steady(), STEADY_S)
        return Pulled(found_s, pod, evidence, time.monotonic() if gone else None)

    def cpu_s(self) -> float:
        """CPU seconds that the pods' processes have taken."""
        total = 0.0
        for name, _ in self.pods():
            try:
                process = self.fleet.running.container(NAMESPACE, name, contract.CONTAINER)
                times = psutil.Process(process.pid).cpu_times()
            except (NotRunningError, psutil.NoSuchProcess):
                continue
            total += times.user + times.system
        return total
