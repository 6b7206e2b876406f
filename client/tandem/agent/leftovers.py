"""Ending containers that have no agent any more."""

from __future__ import annotations

from pathlib import Path

from tandem.agent.store import PodDir, Store
from tandem.cluster.process import end, is_running, wait_gone


def end_pod(folder: PodDir, grace_s: float) -> int:
    """Ends every container of a pod; returns how many ran. Blocks for up to `grace_s`."""
    return _end([folder], grace_s)


def end_all(node_folders: list[Path], grace_s: float) -> int:
    """Ends every container of the nodes; returns how many ran. Blocks for up to `grace_s`."""
    return _end([pod for node in node_folders for pod in Store(node).pods()], grace_s)


def _end(folders: list[PodDir], grace_s: float) -> int:
    started = [run.started() for folder in folders for run in folder.all_runs()]
    running = [run for run in started if run is not None and is_running(run.process)]
    end([run.process for run in running], grace_s)
    # Each shim follows its container, once it has written how it ended.
    end(wait_gone([run.shim for run in running], grace_s), grace_s)
    return len(running)
