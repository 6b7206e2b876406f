"""A cluster that runs, as its user sees it: kubectl, the audit log, and which process is what."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem.agent.api import Credentials
from tandem.agent.store import PodDir, Store
from tandem.cluster.paths import ClusterDir
from tandem.cluster.process import ProcessId, is_running, send_signal
from tandem.cluster.spec import Cluster
from tandem.cluster.supervisor import Report

REVIVE_TIMEOUT_S: Final = 10.0


class KubectlError(RuntimeError):
    """kubectl failed; the message is its own."""


class NotRunningError(LookupError):
    """There is no such process (any more)."""


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that is up."""

    cluster: Cluster
    folder: ClusterDir
    kubectl_path: Path

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.cluster.spec.name

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig of a cluster-admin."""
        return self.folder.kubeconfig

    @property
    def admin(self) -> Credentials:
        """The same identity, for `tandem.agent.api.Api`."""
        pki = self.folder.pki
        url = self.cluster.network.api_url
        return Credentials(url, pki / "ca.crt", pki / "admin.crt", pki / "admin.key")

    def kubectl(self, *arguments: str, input: str | None = None, timeout_s: float = 60.0) -> str:
        """Runs kubectl as cluster-admin and returns its output.

        Raises:
            KubectlError: it failed.
        """
        answer = subprocess.run(
            [self.kubectl_path, f"--kubeconfig={self.kubeconfig}", *arguments],
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if answer.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {answer.stderr.strip()}")
        return answer.stdout

    def process(self, name: str) -> ProcessId:
        """The process of a component or of a node's agent.

        Raises:
            NotRunningError: it was never started, or has ended.
        """
        report = Report.read(self.folder.processes)
        children = report.children if report is not None else ()
        for child in children:
            if child.name == name and is_running(child.process):
                return child.process
        raise NotRunningError(f"{name} does not run in cluster {self.name}")

    def revive(self) -> list[str]:
        """Starts again the components and agents that died; returns their names.

        Raises:
            NotRunningError: the supervisor is gone, or something did not start.
        """
        report = Report.read(self.folder.processes)
        children = report.children if report is not None else ()
        dead = [child.name for child in children if not is_running(child.process)]
        deadline_s = time.monotonic() + REVIVE_TIMEOUT_S
        while report is not None and not all(self._runs(name) for name in dead):
            # Asked again and again: the supervisor may not have heard of a death of this moment.
            if not send_signal(report.supervisor, signal.SIGHUP):
                raise NotRunningError(f"the supervisor of cluster {self.name} is gone")
            if time.monotonic() > deadline_s:
                raise NotRunningError(f"{dead} did not start again: see {self.folder.logs}")
            time.sleep(0.1)
        return dead

    def _runs(self, name: str) -> bool:
        try:
            self.process(name)
        except NotRunningError:
            return False
        return True

    def container(self, namespace: str, pod: str, container: str) -> ProcessId:
        """The first process of a running container, as the machine sees it.

        Raises:
            NotRunningError: the pod runs nowhere here.
        """
        for folder in self._pods():
            record = folder.read()
            metadata = record.pod["metadata"] if record else {}
            if (metadata.get("namespace"), metadata.get("name")) != (namespace, pod):
                continue
            for run in reversed(folder.runs(container)):
                started = run.started()
                if started is not None and run.ending() is None:
                    return started.process
        raise NotRunningError(f"{namespace}/{pod} has no running container {container}")

    def containers(self, node: str) -> list[ProcessId]:
        """The first process of every container that a node runs."""
        runs = [run for pod in self._store(node).pods() for run in pod.all_runs()]
        began = [run.started() for run in runs if run.ending() is None]
        return [one.process for one in began if one is not None and is_running(one.process)]

    def audit_events(self) -> Iterator[dict[str, Any]]:
        """Every finished request, oldest first: `audit.k8s.io/v1` Events at level Metadata."""
        folder = self.folder.audit_log.parent
        rotated = sorted(path for path in folder.iterdir() if path != self.folder.audit_log)
        for path in [*rotated, self.folder.audit_log]:
            with path.open() as lines:
                for line in lines:
                    if line.endswith("\n"):
                        yield json.loads(line)

    def _pods(self) -> list[PodDir]:
        return [pod for node in self.cluster.spec.node_names() for pod in self._store(node).pods()]

    def _store(self, node: str) -> Store:
        return Store(self.folder.node(node))
