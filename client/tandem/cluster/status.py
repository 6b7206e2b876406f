"""`tandem status`: what of a cluster runs, and what died."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

from tandem.cluster.paths import ClusterDir, state_home
from tandem.cluster.process import is_running
from tandem.cluster.spec import Cluster
from tandem.cluster.supervisor import Child, Report


@dataclass(frozen=True, slots=True)
class ProcessLine:
    """One process of the cluster."""

    name: str
    pid: int
    state: str
    """`running`, or how and when it ended."""
    memory_bytes: int
    age_s: float


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """One cluster."""

    cluster: Cluster
    folder: ClusterDir
    supervised: bool
    """Its supervisor runs."""
    processes: tuple[ProcessLine, ...]
    failure: str | None

    @property
    def healthy(self) -> bool:
        """Everything that was started runs."""
        states = {line.state for line in self.processes}
        return self.supervised and not self.failure and states == {"running"}


def cluster_names() -> list[str]:
    """The clusters that have a folder."""
    home = state_home()
    return sorted(path.name for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def read_status(name: str) -> ClusterStatus | None:
    """The status of one cluster; None when there is none of that name."""
    folder = ClusterDir.named(name)
    report = Report.read(folder.processes)
    if report is None or not folder.cluster.exists():
        return None
    return ClusterStatus(
        Cluster.from_json(folder.cluster.read_text()),
        folder,
        is_running(report.supervisor),
        tuple(_line(child) for child in report.children),
        report.failure,
    )


def _line(child: Child) -> ProcessLine:
    age_s = time.time() - child.started_at_s
    if child.ending is not None:
        ago_s = time.time() - child.ending.at_s
        state = f"ended with status {child.ending.status} {ago_s:.0f} s ago"
        return ProcessLine(child.name, child.process.pid, state, 0, age_s)
    if not is_running(child.process):
        return ProcessLine(child.name, child.process.pid, "gone", 0, age_s)
    memory = psutil.Process(child.process.pid).memory_info().rss
    return ProcessLine(child.name, child.process.pid, "running", memory, age_s)
