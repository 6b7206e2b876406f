"""One container of a pod: its runs, its probes, its end. The shell around `lifecycle.Container`.

`view` is the truth that `lifecycle.decide` and `status` read; every change of it wakes the pod.
Work that takes time (starting, stopping, waiting, probing) is a task of its own, and `busy` tells
the pod that one is under way, so that nothing is started or stopped twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.agent import runtime
from tandem.agent.backoff import FIRST_DELAY_S, image_delay_s
from tandem.agent.checking import CommandResult, Target, Verdict, check, unsupported
from tandem.agent.configuration import ConfigError
from tandem.agent.ending import Deadline, end_container
from tandem.agent.events import NORMAL, WARNING
from tandem.agent.exits import exit_of, write_start_error
from tandem.agent.images import Image, NoImage, find_image
from tandem.agent.lifecycle import Container, Exit, Kind, Policy, Run, Waiting
from tandem.agent.probes import Probe, ProbeKind, ProbeState, probes
from tandem.agent.probing import Prober
from tandem.agent.slowing import Slowing, go_on
from tandem.agent.store import ContainerConfig, PodDir, RunDir, Started

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a container needs of its pod."""

    folder: PodDir
    pod_ip: str
    pod_name: str
    """NAME_NAMESPACE(UID), as messages call the pod."""
    grace_s: Callable[[], float]
    """The pod's terminationGracePeriodSeconds."""
    configure: Callable[[dict[str, Any], Image, RunDir, int], Coroutine[Any, Any, ContainerConfig]]
    """Builds what the shim runs; raises ConfigError."""
    record: Callable[[str, str, str, str], None]
    """Reports an Event: type, reason, message, container."""
    wake: Callable[[], None]
    clock: Callable[[], float]


class ContainerWorker:
    """Runs one container of a pod."""

    def __init__(
        self, spec: dict[str, Any], kind: Kind, policy: Policy, around: Surroundings
    ) -> None:
        self.spec = spec
        self.view = Container(spec["name"], kind, policy)
        self._around = around
        self._probes = probes(spec)
        self._hooks: dict[str, Any] = spec.get("lifecycle") or {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing: list[asyncio.Task[None]] = []
        self._started: Started | None = None
        self._exited = asyncio.Event()
        self._deadline = Deadline(float("inf"), around.clock)
        self._image_tries = 0
        self._slowing = Slowing()
        self._slow_percent = 0

    # -- what the pod asks for ---------------------------------------------------------------

    def start(self) -> None:
        """Starts the next run in the background."""
        self._set(busy=True)
        self._spawn(self._start())

    def stop(self, reason: str, deadline_s: float) -> None:
        """Ends the run in the background: preStop, SIGTERM, and SIGKILL at `deadline_s`."""
        self._set(busy=True)
        self._deadline = Deadline(deadline_s, self._around.clock)
        self._spawn(self._stop(reason))

    def tighten(self, deadline_s: float) -> None:
        """Brings the deadline of a stop that is under way forward."""
        self._deadline.tighten(deadline_s)

    def respec(self, spec: dict[str, Any]) -> None:
        """Takes a changed spec; of a container that exists only the image can change."""
        if spec["image"] == self.spec["image"]:
            return
        self.spec = spec
        self._image_tries = 0
        changed = "its image changed, it will be restarted" if self.view.running else None
        self._set(waiting=None, unhealthy=changed)

    def slow(self, percent: int) -> None:
        """Makes runs slower by so much from now on; see slowing.py."""
        self._slow_percent = percent
        if self._started is not None and not self._exited.is_set():
            self._slowing.set(self._started.process, percent)

    def sick_deadline_s(self) -> float:
        """When a container whose liveness or startup probe failed has to be gone."""
        own = [
            probe.grace_s
            for probe in self._probes.values()
            if probe.kind is not ProbeKind.READINESS and probe.grace_s is not None
        ]
        return self._around.clock() + (own[0] if own else self._around.grace_s())

    def adopt(self, known: dict[str, Any] | None) -> None:
        """Takes over the runs on disk; `known` is the container's status in the API, if any."""
        runs = [
            (run, view)
            for run in self._around.folder.runs(self.view.name)
            if (view := self._read_run(run)) is not None
        ]
        if not runs:
            return
        run, latest = runs[-1]
        self._set(latest=latest, previous=runs[-2][1] if len(runs) > 1 else None)
        if latest.exit is not None:
            return
        started = run.started()
        assert started is not None, "a run without an end began"
        same = known is not None and known.get("containerID") == latest.container_id
        was = known if known is not None and same else {}
        # What needs no startup probe has started, whether or not anybody was told.
        begun = bool(was.get("started")) or ProbeKind.STARTUP not in self._probes
        self._set(started=begun, ready=bool(was.get("ready")))
        go_on(started.process)
        self._watch(run, started)

    async def execute(self, argv: Sequence[str], timeout_s: float | None) -> CommandResult:
        """Runs a command in the running container."""
        assert self.view.latest is not None
        run = self._around.folder.run(self.view.name, self.view.latest.number)
        return await runtime.execute(run, argv, timeout_s)

    async def close(self) -> None:
        """Ends the worker's tasks, not the container."""
        tasks = [*self._tasks, *self._probing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._slowing.close()

    # -- starting ----------------------------------------------------------------------------

    async def _start(self) -> None:
        name, record = self.view.name, self._around.record
        image = find_image(self.spec["image"])
        if isinstance(image, NoImage):
            self._wait_for_image(image)
            return
        record(NORMAL, "Pulled", f'Container image "{image.name}" already present on machine', name)
        latest = self.view.latest
        run = self._around.folder.run(name, 0 if latest is None else latest.number + 1)
        strikes = 0 if latest is None else latest.next_strikes()
        begun_s = self._around.clock()
        try:
            config = await self._around.configure(self.spec, image, run, strikes)
            record(NORMAL, "Created", f"Container created: {name}", name)
            started = await runtime.start(run, config)
        except ConfigError as error:
            self._retry_later("CreateContainerConfigError", str(error))
        except runtime.StartError as error:
            message = f"Error: failed to start container: {error}"
            record(WARNING, "Failed", message, name)
            write_start_error(run, str(error), begun_s)
            self._begin(Run(run.number, self._id(run), strikes, begun_s))
            self._finish(Exit(128, 0, begun_s, "StartError", str(error)))
        else:
            record(NORMAL, "Started", f"Container started: {name}", name)
            self._begin(Run(run.number, self._id(run), strikes, started.started_at_s))
            self._watch(run, started)
            await self._post_start()

    def _begin(self, run: Run) -> None:
        self._around.folder.prune(self.view.name)
        self._image_tries = 0
        self._set(
            latest=run,
            previous=self.view.latest,
            waiting=None,
            busy=False,
            started=False,
            ready=False,
            unhealthy=None,
        )

    async def _post_start(self) -> None:
        hook = self._hooks.get("postStart")
        verdict = await self._perform(hook) if hook else Verdict(True)
        if not verdict.success:
            message = f"PostStartHook failed: {verdict.message}"
            self._around.record(WARNING, "FailedPostStartHook", message, self.view.name)
            self._set(unhealthy="its postStart hook failed")
        elif ProbeKind.STARTUP not in self._probes:
            self._set(started=self.view.running)

    def _wait_for_image(self, missing: NoImage) -> None:
        name, image = self.view.name, self.spec["image"]
        first = self._image_tries == 0
        delay_s = image_delay_s(self._image_tries)
        self._image_tries += 1
        failed = f'Failed to pull image "{image}": {missing.sentence}'
        reason = "ErrImagePull" if first else "ImagePullBackOff"
        back_off = f'Back-off pulling image "{image}": {missing.sentence}'
        self._around.record(WARNING, "Failed", failed, name)
        self._around.record(WARNING, "Failed", f"Error: {reason}", name)
        message = missing.sentence if first else back_off
        self._set(waiting=Waiting(reason, message, self._around.clock() + delay_s), busy=False)

    def _retry_later(self, reason: str, message: str) -> None:
        self._around.record(WARNING, "Failed", f"Error: {message}", self.view.name)
        retry_at_s = self._around.clock() + FIRST_DELAY_S
        self._set(waiting=Waiting(reason, message, retry_at_s), busy=False)

    # -- running and ending ------------------------------------------------------------------

    def _watch(self, run: RunDir, started: Started) -> None:
        self._started = started
        self._exited = asyncio.Event()
        self._spawn(self._wait_exit(run, started))
        self.slow(self._slow_percent)
        for probe in self._probes.values():
            if sentence := unsupported(probe.action):
                self._around.record(WARNING, "Unhealthy", sentence, self.view.name)
            else:
                self._probing.append(asyncio.create_task(self._prober(probe).run()))

    async def _wait_exit(self, run: RunDir, started: Started) -> None:
        ending = await runtime.wait(run, started)
        self._exited.set()
        for task in self._probing:
            task.cancel()
        self._probing.clear()
        self._finish(exit_of(run, ending, self.spec))

    def _finish(self, exit_: Exit) -> None:
        assert self.view.latest is not None
        run = dataclasses.replace(self.view.latest, exit=exit_)
        self._set(latest=run, started=False, ready=False, unhealthy=None)
        if not self.view.over and run.restart_at_s() > exit_.finished_at_s:
            name, pod = self.view.name, self._around.pod_name
            message = f"Back-off restarting failed container {name} in pod {pod}"
            self._around.record(WARNING, "BackOff", message, name)

    async def _stop(self, reason: str) -> None:
        assert self._started is not None
        name, record, hook = self.view.name, self._around.record, self._hooks.get("preStop")
        record(NORMAL, "Killing", f"Stopping container {name}: {reason}", name)
        complaint = await end_container(
            self._started,
            self._exited,
            self._deadline,
            self._around.clock,
            (lambda: self._perform(hook)) if hook else None,
        )
        if complaint:
            record(WARNING, "FailedPreStopHook", complaint, name)
        self._set(busy=False)

    # -- probes and hooks --------------------------------------------------------------------

    def _prober(self, probe: Probe) -> Prober:
        latest = self.view.latest
        assert latest is not None
        startup = probe.kind is ProbeKind.STARTUP
        return Prober(
            probe,
            self._target(),
            age_s=lambda: self._around.clock() - latest.started_at_s,
            is_due=lambda: self.view.started != startup and self._is_due(probe),
            take=self._take,
        )

    def _is_due(self, probe: Probe) -> bool:
        """Nobody asks for the life of a container that is ending; it may still be ready."""
        dying = self.view.busy or self.view.unhealthy is not None
        return probe.kind is ProbeKind.READINESS or not dying

    def _take(self, probe: Probe, state: ProbeState, verdict: Verdict) -> None:
        if self._exited.is_set():
            return
        if not verdict.success:
            message = f"{probe.kind.noun} probe failed: {verdict.message}"
            self._around.record(WARNING, "Unhealthy", message, self.view.name)
        if probe.kind is ProbeKind.READINESS:
            self._set(ready=bool(state.verdict))
        elif state.verdict is False:
            self._set(unhealthy=f"its {probe.kind} probe failed, it will be restarted")
        elif probe.kind is ProbeKind.STARTUP and state.verdict:
            self._set(started=True)

    async def _perform(self, hook: dict[str, Any]) -> Verdict:
        """Performs a lifecycle hook; its time is bounded by who asks for it."""
        if sleep := hook.get("sleep"):
            await asyncio.sleep(sleep["seconds"])
            return Verdict(True)
        return await check(hook, self._target(), timeout_s=None)

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
        begun_s = started.started_at_s if started else ending.finished_at_s if ending else None
        if config is None or begun_s is None:
            return None
        exit_ = exit_of(run, ending, self.spec) if ending else None
        return Run(run.number, self._id(run), config.strikes, begun_s, exit_)

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
            log.error("container %s of %s", self.view.name, self._around.pod_name, exc_info=error)
            # Nothing is lost: the pod asks again, and the failure is on record.
            self._retry_later("ContainerError", f"{type(error).__name__}: {error}")
