"""Clusters come and go beside each other, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tandem.cli import app
from tandem.cluster import flags
from tandem.cluster.down import down
from tandem.cluster.process import ProcessId, identify, is_running, send_signal
from tandem.cluster.running import NotRunningError, Running
from tandem.cluster.spec import ClusterSpec
from tandem.cluster.status import read_status
from tandem.cluster.supervisor import Report
from tandem.cluster.up import UpError, up
from typer.testing import CliRunner

Objects = Callable[..., Any]


def small(name: str) -> ClusterSpec:
    """A cluster of one node."""
    return ClusterSpec(name=name, nodes=1, operator=False)


@pytest.fixture
def other(start_cluster: Objects) -> Iterator[Running]:
    """A second cluster, beside the one of the test run."""
    running: Running = start_cluster(small(f"other-{secrets.token_hex(3)}"))
    yield running
    down(running.name)


def processes(cluster: Running) -> list[ProcessId]:
    """The supervisor and its children."""
    report = Report.read(cluster.folder.processes)
    assert report is not None
    return [report.supervisor, *(child.process for child in report.children)]


def mentions(text: str) -> list[str]:
    """The command lines of the machine that contain `text`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line and entry.parent.name != str(os.getpid()):
                found.append(line)
    return found


def start_stubborn_pod(cluster: Running, make_pod: Objects) -> ProcessId:
    """A pod that ignores SIGTERM, with grandchildren in sessions of their own."""
    script = "trap '' TERM; setsid sleep 4242 & touch /tmp/up; while :; do sleep 0.1; done"
    up_probe = {"exec": {"command": ["test", "-e", "/tmp/up"]}, "periodSeconds": 1}
    pod = make_pod("p", script, {"readinessProbe": up_probe}, terminationGracePeriodSeconds=600)
    cluster.kubectl("apply", "-f", "-", input=json.dumps(pod))
    cluster.kubectl("wait", "pod/p", "--for=condition=Ready", "--timeout=30s")
    return cluster.container("default", "p", "c")


def test_two_clusters_side_by_side(
    cluster: Running, other: Running, make_pod: Objects, namespace: str
) -> None:
    assert cluster.cluster.network.slot != other.cluster.network.slot
    start_stubborn_pod(other, make_pod)
    ours = cluster.kubectl("get", "pods", "-A", "-o", "name").split()
    assert "pod/p" not in ours
    uids = [
        c.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
        for c in (cluster, other)
    ]
    assert uids[0] != uids[1]


def test_down_leaves_nothing(other: Running, make_pod: Objects) -> None:
    container = start_stubborn_pod(other, make_pod)
    everything = [*processes(other), container]
    assert all(is_running(process) for process in everything)
    result = CliRunner().invoke(app, ["down", "--name", other.name])
    assert result.exit_code == 0, result.output
    assert "1 containers" in result.output
    assert not any(is_running(process) for process in everything)
    assert mentions(str(other.folder.root)) == []
    assert mentions("sleep 4242") == []
    assert not other.folder.root.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/tandem/{other.name}"))
    again = CliRunner().invoke(app, ["down", "--name", other.name])
    assert (again.exit_code, "there is no cluster" in again.output) == (0, True)


def test_down_keeps_logs_if_asked(other: Running, make_pod: Objects, tmp_path: Path) -> None:
    start_stubborn_pod(other, make_pod)
    down(other.name, tmp_path / "kept")
    assert (tmp_path / "kept" / "components" / "kube-apiserver.log").stat().st_size > 0
    assert (tmp_path / "kept" / "audit" / "audit.log").stat().st_size > 0
    assert list((tmp_path / "kept" / "pods").glob("node-1/**/0.log"))


def test_up_again_changes_nothing(other: Running) -> None:
    before = processes(other)
    notes: list[str] = []
    again = up(small(other.name), notes.append)
    assert again.cluster == other.cluster
    assert processes(other) == before
    assert "runs already" in notes[0]
    with pytest.raises(UpError, match=r"runs with nodes 1, not 3: `tandem down"):
        up(ClusterSpec(name=other.name, nodes=3, operator=False), notes.append)


def test_a_death_is_shown_and_up_mends_it(other: Running, eventually: Objects) -> None:
    victim = other.process("node-1")
    send_signal(victim, signal.SIGKILL)
    eventually(lambda: not is_running(victim))
    eventually(lambda: not (status := read_status(other.name)) or not status.healthy)
    result = CliRunner().invoke(app, ["status", "--name", other.name])
    assert result.exit_code == 1
    assert "ended with status -9" in result.output
    with pytest.raises(NotRunningError):
        other.process("node-1")
    notes: list[str] = []
    up(small(other.name), notes.append)
    assert "started again: node-1" in notes
    assert CliRunner().invoke(app, ["status", "--name", other.name]).exit_code == 0


def test_nothing_outlives_a_killed_supervisor_but_containers(
    other: Running, make_pod: Objects, eventually: Objects
) -> None:
    container = start_stubborn_pod(other, make_pod)
    supervisor, *children = processes(other)
    send_signal(supervisor, signal.SIGKILL)
    eventually(lambda: not any(is_running(process) for process in children))
    assert is_running(container)
    notes: list[str] = []
    up(small(other.name), notes.append)
    assert f"clearing away the remains of cluster {other.name}" in notes
    assert not is_running(container)
    assert other.kubectl("get", "pods", "-o", "name") == ""


def test_a_cluster_goes_down_with_its_owner(eventually: Objects) -> None:
    """As the clusters of a test run do, even when pytest is killed."""
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    identity = identify(owner.pid)
    assert identity is not None
    name = f"owned-{secrets.token_hex(3)}"
    try:
        running = up(small(name), lambda _: None, identity)
        everything = processes(running)
        owner.kill()
        owner.wait()
        eventually(lambda: not any(is_running(process) for process in everything))
        eventually(lambda: not running.folder.root.exists())
    finally:
        owner.kill()
        owner.wait()
        down(name)


def test_a_component_that_cannot_start_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = flags.scheduler
    monkeypatch.setattr(flags, "scheduler", lambda *given: [*healthy(*given), "--no-such-flag"])
    name = f"broken-{secrets.token_hex(3)}"
    try:
        with pytest.raises(UpError) as failure:
            up(small(name), lambda _: None)
        assert "kube-scheduler ended with status" in str(failure.value)
        assert "no-such-flag" in str(failure.value)
        assert CliRunner().invoke(app, ["status", "--name", name]).exit_code == 1
    finally:
        down(name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--name", "Not_A_Name"], "use lower-case letters, digits and '-'"),
        (["--nodes", "0"], "--nodes 0: use 1 to 200"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1: use 0 to 64"),
        (["--node-grace-seconds", "1"], "use 2 s or more"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["up", "--no-operator", *arguments])
    assert result.exit_code == 1
    assert sentence in result.output
