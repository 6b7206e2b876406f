"""Where the local clusters keep their state and their binaries: outside the source tree.

State lives under `$XDG_STATE_HOME/tandem/clusters/NAME` (one folder a cluster, removed by
`tandem down`), binaries under `$XDG_CACHE_HOME/tandem/PROGRAM` (kept).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def state_home() -> Path:
    """The folder of all clusters' state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base).absolute() / "tandem" / "clusters"


def cache_home(program: str = "controlplane") -> Path:
    """The folder of downloaded and built binaries: the control plane's, or another program's."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "tandem" / program


@dataclass(frozen=True, slots=True)
class ClusterDir:
    """The files of one cluster; knows names, touches nothing."""

    root: Path

    @classmethod
    def named(cls, name: str) -> ClusterDir:
        """The folder of the cluster called `name`."""
        return cls(state_home() / name)

    @property
    def cluster(self) -> Path:
        """What was asked for: `spec.Cluster` as JSON, written once by `tandem up`."""
        return self.root / "cluster.json"

    @property
    def plan(self) -> Path:
        """What the supervisor starts: `supervisor.Plan` as JSON, written once by `tandem up`."""
        return self.root / "plan.json"

    @property
    def processes(self) -> Path:
        """What runs: `supervisor.Report` as JSON, rewritten by the supervisor at each change."""
        return self.root / "processes.json"

    @property
    def kubeconfig(self) -> Path:
        """The user's kubeconfig (cluster-admin), mode 0600."""
        return self.root / "kubeconfig"

    @property
    def pki(self) -> Path:
        """Keys and certificates."""
        return self.root / "pki"

    @property
    def config(self) -> Path:
        """Files that the components' flags name."""
        return self.root / "config"

    @property
    def etcd(self) -> Path:
        """etcd's data."""
        return self.root / "etcd"

    @property
    def logs(self) -> Path:
        """One log file a process: COMPONENT.log."""
        return self.root / "logs"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log, JSON lines."""
        return self.root / "audit" / "audit.log"

    def node(self, name: str) -> Path:
        """What the agent of one node keeps: pods, volumes, container logs."""
        return self.root / "nodes" / name
