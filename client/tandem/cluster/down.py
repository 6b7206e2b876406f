"""`tandem down`: ends exactly the processes of one cluster, and removes what it kept.

Works in whatever state the cluster is: running, half started, or without its supervisor.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.agent.leftovers import end_all
from tandem.cluster.lock import lock
from tandem.cluster.paths import ClusterDir
from tandem.cluster.process import end, is_running, send_signal, wait_gone
from tandem.cluster.supervisor import Report

SUPERVISOR_GRACE_S: Final = 30.0
CONTAINER_GRACE_S: Final = 1.0
CGROUPS: Final = (Path("/sys/fs/cgroup/tandem"), Path("/sys/fs/cgroup/cpu/tandem"))
MEMORY_HOME: Final = Path("/dev/shm/tandem")


@dataclass(frozen=True, slots=True)
class Ended:
    """What was ended."""

    processes: int
    containers: int


def down(name: str, keep_logs: Path | None = None) -> Ended | None:
    """Ends the cluster; None when there is none of that name.

    `keep_logs`: a new folder that receives the logs of all components and pods.
    """
    if not ClusterDir.named(name).root.exists():
        return None
    with lock(name):
        return end_cluster(name, keep_logs)


def end_cluster(name: str, keep_logs: Path | None = None) -> Ended:
    """The same, for who holds the lock."""
    folder = ClusterDir.named(name)
    report = Report.read(folder.processes)
    processes = _end_processes(report) if report is not None else 0
    nodes = folder.root / "nodes"
    containers = end_all(sorted(nodes.iterdir()) if nodes.is_dir() else [], CONTAINER_GRACE_S)
    if keep_logs is not None:
        _keep_logs(folder, keep_logs)
    _remove(folder, name)
    return Ended(processes, containers)


def _end_processes(report: Report) -> int:
    """Ends the supervisor, which ends its children; then whatever of them is left."""
    alive = [c.process for c in report.children if c.ending is None and is_running(c.process)]
    count = len(alive) + int(is_running(report.supervisor))
    if send_signal(report.supervisor, signal.SIGTERM):
        for process in wait_gone([report.supervisor], SUPERVISOR_GRACE_S):
            send_signal(process, signal.SIGKILL)
    end([process for process in alive if is_running(process)], grace_s=1.0)
    return count


def _keep_logs(folder: ClusterDir, target: Path) -> None:
    target.mkdir(parents=True)
    shutil.copytree(folder.logs, target / "components")
    shutil.copytree(folder.audit_log.parent, target / "audit")
    for log in sorted(folder.root.glob("nodes/*/pods/*/containers/*/*.log")):
        copy = target / "pods" / log.relative_to(folder.root / "nodes")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, copy)


def _remove(folder: ClusterDir, name: str) -> None:
    shutil.rmtree(folder.root, ignore_errors=True)
    shutil.rmtree(MEMORY_HOME / name, ignore_errors=True)
    for root in CGROUPS:
        for path, _, _ in os.walk(root / name, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
