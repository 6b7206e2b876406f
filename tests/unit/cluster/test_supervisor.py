"""The supervisor with real, small processes in the place of a control plane."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tandem.cluster.paths import ClusterDir
from tandem.cluster.process import identify, is_running, send_signal
from tandem.cluster.supervisor import Command, Plan, Report, Stage

SLEEP = ("sleep", "600")


def eventually(test: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 10
    while not test():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


class Supervised:
    """A running supervisor."""

    def __init__(self, folder: ClusterDir, plan: Plan) -> None:
        folder.logs.mkdir(parents=True)
        folder.plan.write_text(plan.to_json())
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cluster.supervisor", str(folder.root)]
        )

    def report(self) -> Report:
        report = Report.read(self.folder.processes)
        assert report is not None
        return report

    def names(self) -> list[str]:
        report = Report.read(self.folder.processes)
        return [child.name for child in report.children] if report else []


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(*stages: Stage, **changes: object) -> Supervised:
        plan = Plan(stages, "", **changes)  # type: ignore[arg-type]
        started.append(Supervised(ClusterDir(tmp_path / "cluster"), plan))
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.wait()


def command(name: str, *argv: str, **env: str) -> Command:
    return Command(name, argv or SLEEP, env)


def test_round_trips() -> None:
    identity = identify(os.getpid())
    plan = Plan((Stage((command("a", X="1"),), "https://x"), Stage(())), "/ca", identity)
    assert Plan.from_json(plan.to_json()) == plan


def test_stages_wait_for_each_other(
    supervise: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # Must not be asked for loopback.
    ready = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if ready.is_set() else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        cluster = supervise(Stage((command("one"),), url), Stage((command("two"),)))
        eventually(lambda: cluster.names() == ["one"])
        time.sleep(0.3)
        assert cluster.names() == ["one"]
        ready.set()
        eventually(lambda: cluster.names() == ["one", "two"])
        server.shutdown()


def test_a_death_before_readiness_is_a_failure(supervise: Callable[..., Supervised]) -> None:
    cluster = supervise(
        Stage((command("one", "sh", "-c", "exit 3"),), "http://127.0.0.1:1"),
        Stage((command("two"),)),
    )
    eventually(lambda: cluster.names() and cluster.report().failure)
    assert cluster.report().failure == "one ended before http://127.0.0.1:1 answered"
    [dead] = cluster.report().dead()
    assert dead.ending is not None
    assert dead.ending.status == 3
    assert cluster.names() == ["one"]


def test_deaths_are_noted_and_nothing_is_restarted(supervise: Callable[..., Supervised]) -> None:
    cluster = supervise(Stage((command("one"), command("two"))))
    eventually(lambda: cluster.names() == ["one", "two"])
    send_signal(cluster.report().children[0].process, signal.SIGKILL)
    eventually(lambda: cluster.report().dead())
    [dead] = cluster.report().dead()
    assert dead.ending is not None
    assert (dead.name, dead.ending.status) == ("one", -signal.SIGKILL)
    assert is_running(cluster.report().children[1].process)


def test_hangup_starts_again_what_died(supervise: Callable[..., Supervised]) -> None:
    cluster = supervise(Stage((command("one"), command("two"))))
    eventually(lambda: cluster.names() == ["one", "two"])
    before = {child.name: child.process for child in cluster.report().children}
    send_signal(before["one"], signal.SIGKILL)
    eventually(lambda: cluster.report().dead())
    cluster.process.send_signal(signal.SIGHUP)
    eventually(lambda: not cluster.report().dead())
    after = {child.name: child.process for child in cluster.report().children}
    assert after["two"] == before["two"]
    assert after["one"] != before["one"]
    assert is_running(after["one"])


def test_it_ends_its_stages_in_reverse(
    supervise: Callable[..., Supervised], tmp_path: Path
) -> None:
    script = "trap 'echo $NAME >> $OUT; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    out = str(tmp_path / "order")
    stages = [
        Stage((command(name, "sh", "-c", script, NAME=name, OUT=out),)) for name in ("a", "b", "c")
    ]
    cluster = supervise(*stages)
    logs = [cluster.folder.logs / f"{name}.log" for name in ("a", "b", "c")]
    eventually(lambda: all(log.exists() and log.read_text() for log in logs))
    children = [child.process for child in cluster.report().children]
    cluster.process.terminate()
    assert cluster.process.wait(20) == 0
    assert Path(out).read_text().split() == ["c", "b", "a"]
    assert not any(is_running(child) for child in children)


def test_its_children_die_with_it(supervise: Callable[..., Supervised]) -> None:
    cluster = supervise(Stage((command("one"), command("two"))))
    eventually(lambda: cluster.names() == ["one", "two"])
    children = [child.process for child in cluster.report().children]
    cluster.process.kill()
    cluster.process.wait()
    eventually(lambda: not any(is_running(child) for child in children))


def test_orphans_are_reaped(supervise: Callable[..., Supervised], tmp_path: Path) -> None:
    """The shims of a killed agent become the supervisor's, and must not stay as zombies."""
    pid_file = tmp_path / "pid"
    script = f"(sleep 0.3 & echo $! > {pid_file}); exec sleep 600"
    cluster = supervise(Stage((command("one", "sh", "-c", script),)))
    eventually(lambda: pid_file.exists() and pid_file.read_text().strip())
    pid = int(pid_file.read_text())
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert cluster.process.poll() is None


def test_the_report_is_always_whole(supervise: Callable[..., Supervised]) -> None:
    cluster = supervise(Stage(tuple(command(f"c{n}") for n in range(20))))
    while len(cluster.names()) < 20:
        if cluster.folder.processes.exists():
            json.loads(cluster.folder.processes.read_text())
