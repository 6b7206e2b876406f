"""CPU limits of containers by cgroup (v2 cpu.max, or v1 cfs_quota), where the machine lets us.

Memory limits are not enforced: a container reads its own limit and keeps to it.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
PERIOD_US: Final = 100_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CpuCgroups:
    """The folder below which this node's containers get their cgroups."""

    folder: Path
    v2: bool

    @classmethod
    def create(cls, cluster: str, node: str, root: Path = ROOT) -> CpuCgroups | None:
        """Finds the hierarchy and makes our folder in it; None, and a word in the log, if the
        machine does not let us."""
        v2 = (root / "cgroup.controllers").exists()
        base = root if v2 else root / "cpu"
        folder = base / "tandem" / cluster / node
        try:
            if not base.is_dir():
                raise FileNotFoundError(f"no cgroup hierarchy at {base}")
            folder.mkdir(parents=True, exist_ok=True)
            if v2:
                for parent in (root, *reversed(folder.parents[:2]), folder):
                    (parent / "cgroup.subtree_control").write_text("+cpu")
        except OSError as error:
            log.warning("CPU limits are not enforced: %s", error)
            return None
        return cls(folder, v2)

    def limit(self, uid: str, container: str, milli_cpus: int) -> str | None:
        """Makes the cgroup of a container; returns the folder whose cgroup.procs it joins."""
        path = self.folder / f"{uid}-{container}"
        quota_us = max(1000, milli_cpus * PERIOD_US // 1000)
        try:
            path.mkdir(exist_ok=True)
            if self.v2:
                (path / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            else:
                (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (path / "cpu.cfs_quota_us").write_text(str(quota_us))
        except OSError as error:
            log.warning("CPU limit of %s: %s", path.name, error)
            return None
        return str(path)

    def remove(self, uid: str) -> None:
        """Removes the cgroups of a pod of which nothing runs any more."""
        for path in self.folder.glob(f"{uid}-*"):
            with contextlib.suppress(OSError):
                path.rmdir()
