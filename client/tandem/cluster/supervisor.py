"""Owns the processes of one cluster: starts them in stages, ends them together.

It restarts nothing by itself: a dead component is news, not an accident to hide. SIGHUP (sent by
`tandem up`) makes it start again what has died.

Run as `python -m tandem.cluster.supervisor DIR`, detached. It reads `plan.json`, starts each stage
once the previous one answers its ready URL, and keeps `processes.json` true: pid, start time and,
for the dead, when and how they ended. Its children die with it (PDEATHSIG), whatever ends it;
containers, which outlive their agents on purpose, are ended by `tandem down`.
Standard library only: it lives as long as the cluster and should cost nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem.cluster.paths import ClusterDir
from tandem.cluster.process import (
    ProcessId,
    become_subreaper,
    end,
    identify,
    open_pidfd,
    spawn_child,
)

READY_TIMEOUT_S: Final = 120.0
READY_POLL_S: Final = 0.1
END_GRACE_S: Final = 2.0
"""For each stage. An API server with open watches would take longer, for nobody's good."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    """Added to the supervisor's own environment."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Processes that start together, and what to wait for before the next stage."""

    commands: tuple[Command, ...]
    ready_url: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a cluster, first to start first."""

    stages: tuple[Stage, ...]
    ca: str
    """The file of the CA that signs the ready URLs' certificates."""
    owner: ProcessId | None = None
    """The cluster goes down when this process ends; None: it stays until `tandem down`."""

    def to_json(self) -> str:
        """The contents of `ClusterDir.plan`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        stages = tuple(
            Stage(
                tuple(Command(c["name"], tuple(c["argv"]), c["env"]) for c in stage["commands"]),
                stage["ready_url"],
            )
            for stage in data["stages"]
        )
        owner = None if data["owner"] is None else ProcessId(**data["owner"])
        return cls(stages, data["ca"], owner)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended."""

    at_s: float
    """Unix time."""
    status: int
    """Exit status; negative: the signal that ended it."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started."""

    name: str
    process: ProcessId
    started_at_s: float
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What `processes.json` says."""

    supervisor: ProcessId
    children: tuple[Child, ...] = ()
    failure: str | None = None
    """Why the stages could not all be started."""

    def to_json(self) -> str:
        """The contents of `ClusterDir.processes`."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        children = tuple(
            Child(
                child["name"],
                ProcessId(**child["process"]),
                child["started_at_s"],
                None if child["ending"] is None else Ending(**child["ending"]),
            )
            for child in data["children"]
        )
        return cls(ProcessId(**data["supervisor"]), children, data["failure"])

    @classmethod
    def read(cls, path: Path) -> Report | None:
        """The report in `path`; None when there is none yet."""
        try:
            return cls.from_json(path.read_text())
        except FileNotFoundError:
            return None

    def dead(self) -> list[Child]:
        """The children that ended."""
        return [child for child in self.children if child.ending is not None]


class Supervisor:
    """The running supervisor of one cluster."""

    def __init__(self, folder: ClusterDir) -> None:
        me = identify(os.getpid())
        assert me is not None, "a running process has a /proc entry"
        self._folder = folder
        self._plan = Plan.from_json(folder.plan.read_text())
        self._report = Report(me)
        self._handles: dict[str, subprocess.Popen[bytes]] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Starts everything, then notes deaths until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(signal.SIGHUP, self._revive)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        self._write(self._report)
        if self._plan.owner is not None:
            self._follow(self._plan.owner)
        starting = asyncio.create_task(self._start_all())
        await self._stop.wait()
        starting.cancel()
        self._end_all()

    def _follow(self, owner: ProcessId) -> None:
        """Runs `tandem down`, detached, when the owner ends: one way down for all cases."""
        loop = asyncio.get_running_loop()
        fd = open_pidfd(owner)
        name = self._folder.root.name

        def go_down() -> None:
            if fd is not None:
                loop.remove_reader(fd)
            command = [sys.executable, "-m", "tandem.cli", "down", "--name", name]
            subprocess.Popen(command, start_new_session=True)

        if fd is None:
            go_down()
        else:
            loop.add_reader(fd, go_down)

    async def _start_all(self) -> None:
        for stage in self._plan.stages:
            for command in stage.commands:
                self._start(command)
            if stage.ready_url and not await self._wait_ready(stage):
                return

    def _start(self, command: Command) -> None:
        log = self._folder.logs / f"{command.name}.log"
        handle = spawn_child(command.argv, log, {**os.environ, **command.env})
        self._handles[command.name] = handle
        process = identify(handle.pid) or ProcessId(handle.pid, 0)
        child = Child(command.name, process, time.time())
        others = tuple(c for c in self._report.children if c.name != command.name)
        self._write(dataclasses.replace(self._report, children=(*others, child)))

    def _revive(self) -> None:
        """Starts again the children that ended, first stages first."""
        self._reap()
        dead = {child.name for child in self._report.dead()}
        for stage in self._plan.stages:
            for command in stage.commands:
                if command.name in dead:
                    self._start(command)

    async def _wait_ready(self, stage: Stage) -> bool:
        assert stage.ready_url is not None
        context = ssl.create_default_context(cafile=self._plan.ca)
        names = {command.name for command in stage.commands}
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            dead = [child.name for child in self._report.dead() if child.name in names]
            if dead:
                self._fail(f"{dead[0]} ended before {stage.ready_url} answered")
                return False
            if await asyncio.to_thread(_answers_ok, stage.ready_url, context):
                return True
            await asyncio.sleep(READY_POLL_S)
        self._fail(f"{stage.ready_url} did not answer within {READY_TIMEOUT_S:.0f} s")
        return False

    def _fail(self, sentence: str) -> None:
        self._write(dataclasses.replace(self._report, failure=sentence))

    def _reap(self) -> None:
        """Notes the children that ended, and reaps the orphans that became ours."""
        endings: dict[int, Ending] = {}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            endings[pid] = Ending(time.time(), os.waitstatus_to_exitcode(status))
        children = tuple(
            dataclasses.replace(child, ending=endings[child.process.pid])
            if child.ending is None and child.process.pid in endings
            else child
            for child in self._report.children
        )
        if children != self._report.children:
            self._write(dataclasses.replace(self._report, children=children))

    def _end_all(self) -> None:
        """Ends the stages in reverse, so that nobody loses the server it talks to."""
        running = {c.name: c.process for c in self._report.children if c.ending is None}
        for stage in reversed(self._plan.stages):
            end([running[c.name] for c in stage.commands if c.name in running], END_GRACE_S)

    def _write(self, report: Report) -> None:
        self._report = report
        target = self._folder.processes
        draft = target.with_suffix(".tmp")
        draft.write_text(report.to_json())
        draft.replace(target)


def _answers_ok(url: str, context: ssl.SSLContext) -> bool:
    # No proxy: the environment may name one, and it does not know our loopback addresses.
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    """Entry point of `python -m tandem.cluster.supervisor DIR`."""
    become_subreaper()
    asyncio.run(Supervisor(ClusterDir(Path(sys.argv[1]))).run())


if __name__ == "__main__":
    main()
