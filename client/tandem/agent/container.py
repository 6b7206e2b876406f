"""One container of a pod: its runs, its probes, its end. The shell around `lifecycle.Container`.

`view` is the truth that `lifecycle.decide` and `status` read; every change of it wakes the pod.
Work that takes time (starting, stopping, waiting, probing) is a task of its own, and `busy` tells
the pod that one is under way, so that nothing is started or stopped twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tandem.agent import runtime
from tandem.agent.backoff import FIRST_DELAY_S, LAST_DELAY_S
from tandem.agent.checking import CommandResult, Target, Verdict, check, unsupported
from tandem.agent.configuration import ConfigError
from tandem.agent.events import NORMAL, WARNING
from tandem.agent.images import Image, NoImage, find_image
from tandem.agent.lifecycle import Container, Exit, Kind, Policy, Run, Waiting
from tandem.agent.logs import tail_text
from tandem.agent.probes import Probe, ProbeKind, ProbeState, observe, probes
from tandem.agent.store import ContainerConfig, Ending, PodDir, RunDir, Started

LEAST_GRACE_S: Final = 2.0
"""Even a force-deleted container gets this long between SIGTERM and SIGKILL."""
MESSAGE_LIMIT_BYTES: Final = 4096
FALLBACK_LIMIT_BYTES: Final = 2048
FALLBACK_LIMIT_LINES: Final = 80

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a container needs of its pod."""

    folder: PodDir
    pod_ip: str
    configure: Callable[[dict[str, Any], Image, RunDir, int], Coroutine[Any, Any, ContainerConfig]]
    """Builds the shim's configuration; raises ConfigError."""
    record: Callable[[str, str, str, str], None]
    """Reports an Event: type, reason, message, container."""
    wake: Callable[[], None]
    clock: Callable[[], float]
    name: str
    """POD_NAMESPACE(UID), as messages call the pod."""
    grace_s: Callable[[], float]
    """The pod's terminationGracePeriodSeconds."""


class ContainerWorker:
    """Runs one container of a pod."""

    def __init__(self, spec: dict[str, Any], kind: Kind, policy: Policy, around: Surroundings):
        self.spec = spec
        self.view = Container(spec["name"], kind, policy)
        self._around = around
        self._probes = probes(spec)
        self._tasks: set[asyncio.Task[None]] = set()
        self._probe_tasks: list[asyncio.Task[None]] = []
        self._started: Started | None = None
        self._exited = asyncio.Event()
        self._deadline_s = float("inf")
        self._deadline_moved = asyncio.Event()
        self._image_tries = 0

    # -- what the pod asks for ---------------------------------------------------------------

    def start(self) -> None:
        """Starts the next run in the background."""
        self._set(busy=True)
        self._spawn(self._start())

    def stop(self, reason: str, deadline_s: float) -> None:
        """Ends the run in the background: preStop, SIGTERM, and SIGKILL at `deadline_s`."""
        self._set(busy=True)
        self._deadline_s = deadline_s
        self._spawn(self._stop(reason))

    def tighten(self, deadline_s: float) -> None:
        """Brings the deadline of a stop that is under way forward; never back."""
        if deadline_s < self._deadline_s:
            self._deadline_s = deadline_s
            self._deadline_moved.set()

    def sick_deadline_s(self) -> float:
        """When a container whose liveness or startup probe failed has to be gone."""
        graces = [p.grace_s for p in self._probes.values() if p.kind is not ProbeKind.READINESS]
        own = next((grace for grace in graces if grace is not None), None)
        return self._around.clock() + (self._around.grace_s() if own is None else own)

    def adopt(self, known: dict[str, Any] | None) -> None:
        """Takes over the runs on disk; `known` is the container's status in the API, if any."""
        runs = self._around.folder.runs(self.view.name)
        views = [run for run in map(self._read_run, runs) if run is not None]
        if not views:
            return
        latest, previous = views[-1], views[-2] if len(views) > 1 else None
        self._set(latest=latest, previous=previous)
        if latest.exit is not None:
            return
        self._started = runs[-1].started()
        assert self._started is not None
        same = known is not None and known.get("containerID") == latest.container_id
        was_started = same and bool((known or {}).get("started"))
        self._set(started=was_started, ready=same and bool((known or {}).get("ready")))
        self._watch(runs[-1], self._started)

    async def close(self) -> None:
        """Ends the worker's tasks, not the container."""
        tasks = [*self._tasks, *self._probe_tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- starting ----------------------------------------------------------------------------

    async def _start(self) -> None:
        name, record = self.view.name, self._around.record
        image = find_image(self.spec["image"])
        if isinstance(image, NoImage):
            self._wait_for_image(image)
            return
        record(NORMAL, "Pulled", f'Container image "{image.name}" already present on machine', name)
        number = 0 if self.view.latest is None else self.view.latest.number + 1
        strikes = 0 if self.view.latest is None else self.view.latest.next_strikes()
        run = self._around.folder.run(name, number)
        try:
            config = await self._around.configure(self.spec, image, run, strikes)
        except ConfigError as error:
            self._retry_later("CreateContainerConfigError", str(error))
            return
        record(NORMAL, "Created", f"Container created: {name}", name)
        begun_s = self._around.clock()
        try:
            started = await runtime.start(run, config)
        except runtime.StartError as error:
            message = str(error)
            record(WARNING, "Failed", f"Error: failed to start container: {message}", name)
            run.write_ending(Ending(128, 0, begun_s))
            (run.path / "start-error").write_text(message)
            self._begin(Run(number, self._id(run), strikes, begun_s))
            self._finish(Exit(128, 0, begun_s, "StartError", message))
            return
        record(NORMAL, "Started", f"Container started: {name}", name)
        self._around.folder.prune(name)
        self._started = started
        self._begin(Run(number, self._id(run), strikes, started.started_at_s))
        self._watch(run, started)
        await self._post_start()

    async def _post_start(self) -> None:
        hook = (self.spec.get("lifecycle") or {}).get("postStart")
        if not hook:
            return
        verdict = await self._perform(hook, timeout_s=float("inf"))
        if not verdict.success:
            message = f"PostStartHook failed: {verdict.message}"
            self._around.record(WARNING, "FailedPostStartHook", message, self.view.name)
            self._set(unhealthy="FailedPostStartHook")

    def _begin(self, run: Run) -> None:
        self._image_tries = 0
        self._exited = asyncio.Event()
        self._set(
            latest=run,
            previous=self.view.latest,
            waiting=None,
            busy=False,
            started=ProbeKind.STARTUP not in self._probes,
            ready=False,
            unhealthy=None,
        )

    def _wait_for_image(self, missing: NoImage) -> None:
        name, record = self.view.name, self._around.record
        image = self.spec["image"]
        first = self._image_tries == 0
        delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._image_tries, 5))
        self._image_tries += 1
        record(WARNING, "Failed", f'Failed to pull image "{image}": {missing.sentence}', name)
        reason = "ErrImagePull" if first else "ImagePullBackOff"
        record(WARNING, "Failed", f"Error: {reason}", name)
        back_off = f'Back-off pulling image "{image}": {missing.sentence}'
        message = missing.sentence if first else back_off
        waiting = Waiting(reason, message, self._around.clock() + delay_s)
        self._set(waiting=waiting, busy=False)

    def _retry_later(self, reason: str, message: str) -> None:
        self._around.record(WARNING, "Failed", f"Error: {message}", self.view.name)
        self._set(
            waiting=Waiting(reason, message, self._around.clock() + FIRST_DELAY_S), busy=False
        )

    # -- running and ending ------------------------------------------------------------------

    def _watch(self, run: RunDir, started: Started) -> None:
        self._exited = asyncio.Event()
        self._spawn(self._wait_exit(run, started))
        for probe in self._probes.values():
            self._probe_tasks.append(asyncio.create_task(self._keep_probing(probe)))

    async def _wait_exit(self, run: RunDir, started: Started) -> None:
        ending = await runtime.wait(run, started)
        self._exited.set()
        for task in self._probe_tasks:
            task.cancel()
        self._probe_tasks.clear()
        self._finish(self._exit(run, ending))

    def _finish(self, exit_: Exit) -> None:
        assert self.view.latest is not None
        run = dataclasses.replace(self.view.latest, exit=exit_)
        self._set(latest=run, started=False, ready=False, unhealthy=None)
        if self.view.due_at_s() is not None and run.restart_at_s() > exit_.finished_at_s:
            message = (
                f"Back-off restarting failed container {self.view.name} in pod {self._around.name}"
            )
            self._around.record(WARNING, "BackOff", message, self.view.name)

    async def _stop(self, reason: str) -> None:
        assert self._started is not None
        name = self.view.name
        self._around.record(NORMAL, "Killing", f"Stopping container {name}: {reason}", name)
        hook = (self.spec.get("lifecycle") or {}).get("preStop")
        if hook and not self._exited.is_set():
            await self._pre_stop(hook)
        self._deadline_s = max(self._deadline_s, self._around.clock() + LEAST_GRACE_S)
        runtime.terminate(self._started)
        if not await self._exits_in_time():
            runtime.kill(self._started)
            await self._exited.wait()
        self._set(busy=False)

    async def _pre_stop(self, hook: dict[str, Any]) -> None:
        performing = asyncio.create_task(self._perform(hook, timeout_s=float("inf")))
        while not performing.done() and not self._exited.is_set():
            left_s = self._deadline_s - self._around.clock()
            if left_s <= 0:
                break
            self._deadline_moved.clear()
            moved = asyncio.create_task(self._deadline_moved.wait())
            exited = asyncio.create_task(self._exited.wait())
            await asyncio.wait(
                {performing, moved, exited}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            moved.cancel()
            exited.cancel()
        if not performing.done():
            performing.cancel()
            if not self._exited.is_set():
                self._around.record(
                    WARNING, "FailedPreStopHook", "PreStopHook took too long", self.view.name
                )
        elif not (verdict := performing.result()).success:
            message = f"PreStopHook failed: {verdict.message}"
            self._around.record(WARNING, "FailedPreStopHook", message, self.view.name)

    async def _exits_in_time(self) -> bool:
        """Waits for the exit until the deadline, which may move while we wait."""
        while not self._exited.is_set():
            left_s = self._deadline_s - self._around.clock()
            if left_s <= 0:
                return False
            self._deadline_moved.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await _first(self._exited, self._deadline_moved)
        return True

    # -- probes and hooks --------------------------------------------------------------------

    async def _keep_probing(self, probe: Probe) -> None:
        if sentence := unsupported(probe.action):
            self._around.record(WARNING, "Unhealthy", sentence, self.view.name)
            return
        state = ProbeState.initial(probe.kind)
        assert self.view.latest is not None
        age_s = self._around.clock() - self.view.latest.started_at_s
        await asyncio.sleep(max(0.0, probe.initial_delay_s - age_s))
        while not self._exited.is_set():
            due_s = self._around.clock() + probe.period_s
            if self.view.started != (probe.kind is ProbeKind.STARTUP):
                verdict = await check(probe.action, self._target(), probe.timeout_s)
                state = observe(probe, state, verdict.success)
                self._take(probe, state, verdict)
                if probe.kind is ProbeKind.STARTUP and state.verdict is not None:
                    return
                if self.view.unhealthy:
                    return
            await asyncio.sleep(max(0.0, due_s - self._around.clock()))

    def _take(self, probe: Probe, state: ProbeState, verdict: Verdict) -> None:
        if self._exited.is_set():
            return
        if not verdict.success:
            message = f"{probe.kind.noun} probe failed: {verdict.message}"
            self._around.record(WARNING, "Unhealthy", message, self.view.name)
        if probe.kind is ProbeKind.READINESS:
            self._set(ready=bool(state.verdict))
        elif state.verdict is False:
            reason = f"Container {self.view.name} failed {probe.kind} probe, will be restarted"
            self._set(unhealthy=reason)
        elif probe.kind is ProbeKind.STARTUP and state.verdict:
            self._set(started=True)

    async def _perform(self, hook: dict[str, Any], timeout_s: float) -> Verdict:
        if sleep := hook.get("sleep"):
            await asyncio.sleep(sleep["seconds"])
            return Verdict(True)
        return await check(hook, self._target(), timeout_s)

    async def execute(self, argv: Sequence[str], timeout_s: float) -> CommandResult:
        """Runs a command in the running container."""
        assert self.view.latest is not None
        run = self._around.folder.run(self.view.name, self.view.latest.number)
        return await runtime.execute(run, argv, timeout_s)

    def _target(self) -> Target:
        ports = {
            port["name"]: port["containerPort"]
            for port in self.spec.get("ports") or []
            if port.get("name")
        }
        return Target(self._around.pod_ip, ports, self.execute)

    # -- records -----------------------------------------------------------------------------

    def _id(self, run: RunDir) -> str:
        return f"tandem://{self._around.folder.uid}/{self.view.name}/{run.number}"

    def _read_run(self, run: RunDir) -> Run | None:
        """What the folder of an earlier agent's run says; None when it never began."""
        config, started, ending = run.read_config(), run.started(), run.ending()
        if config is None or (started is None and ending is None):
            return None
        begun_s = started.started_at_s if started else ending.finished_at_s if ending else 0.0
        view = Run(run.number, self._id(run), config.strikes, begun_s)
        return dataclasses.replace(view, exit=self._exit(run, ending)) if ending else view

    def _exit(self, run: RunDir, ending: Ending) -> Exit:
        start_error = run.path / "start-error"
        if start_error.exists():
            message = start_error.read_text()
            return Exit(ending.code, 0, ending.finished_at_s, "StartError", message)
        reason = "Completed" if ending.code == 0 else "Error"
        message = self._termination_message(run, ending.code)
        return Exit(ending.code, ending.signal, ending.finished_at_s, reason, message)

    def _termination_message(self, run: RunDir, code: int) -> str:
        config = run.read_config()
        if config is None:
            return ""
        with contextlib.suppress(OSError), open(config.termination_log, "rb") as file:
            if data := file.read(MESSAGE_LIMIT_BYTES):
                return data.decode(errors="replace")
        if code != 0 and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            return tail_text(run.log, FALLBACK_LIMIT_LINES, FALLBACK_LIMIT_BYTES)
        return ""

    def _set(self, **changes: Any) -> None:
        view = dataclasses.replace(self.view, **changes)
        if view.started and view.running and ProbeKind.READINESS not in self._probes:
            view = dataclasses.replace(view, ready=True)
        if view != self.view:
            self.view = view
            self._around.wake()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("container %s of %s", self.view.name, self._around.name, exc_info=error)
            # Nothing is lost: the pod asks again, and the failure is on record.
            self._retry_later("ContainerError", f"{type(error).__name__}: {error}")


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
