"""One pod on this node, from its admission to its removal: the shell around `lifecycle.decide`.

`run` asks what is due, does it, reports the status, and sleeps until something happens. What
happens (a change of the pod's object, an exit, a probe's result) only wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any, Final

import aiohttp

from tandem.agent.api import ApiError, Object
from tandem.agent.config import Gpu
from tandem.agent.configuration import PodPlace, configure
from tandem.agent.container import ContainerWorker, Surroundings
from tandem.agent.events import WARNING
from tandem.agent.images import Image
from tandem.agent.lifecycle import Fate, Kind, Outcome, Step, decide
from tandem.agent.podspec import containers, full_name, grace_s
from tandem.agent.reporting import StatusWriter
from tandem.agent.services import Services
from tandem.agent.slowing import SlowError, slow_percent
from tandem.agent.status import PodState, pod_status
from tandem.agent.store import ContainerConfig, PodRecord, RunDir
from tandem.agent.tokens import TokenSource
from tandem.agent.volumes import VolumeError, Volumes

REFRESH_S: Final = 60.0
FIRST_MOUNT_RETRY_S: Final = 0.5
LAST_MOUNT_RETRY_S: Final = 60.0
DEADLINE_EXCEEDED: Final = "Pod was active on the node longer than the specified deadline"

log = logging.getLogger(__name__)


class PodWorker:
    """Runs one pod; one with `begun_s` was begun then, by an earlier agent."""

    def __init__(
        self,
        services: Services,
        pod: Object,
        ip: str,
        gpus: dict[str, list[Gpu]],
        *,
        begun_s: float | None = None,
    ) -> None:
        self.pod = pod
        self.ip = ip
        self.gpus = gpus
        self._services = services
        self._clock = services.clock
        self._folder = services.store.pod(pod["metadata"]["uid"])
        self._adopted = begun_s is not None
        self._begun_s = services.clock() if begun_s is None else begun_s
        self._outcome = Outcome.GOING
        self._expired = False
        self._gone = False
        self._slow_refusal: str | None = None
        self._deadline_s: float | None = None
        self._places: dict[str, Path] | None = None
        self._wake = asyncio.Event()
        self._object_changed = asyncio.Event()
        self._writer = StatusWriter(services.api, pod)
        self._volumes = Volumes(
            services.objects,
            TokenSource(services.api, pod, services.clock),
            self._folder,
            Path(services.config.memory_home) / self._folder.uid,
            ip,
            services.host,
        )
        self.containers = self._make_containers()

    # -- what the node tells -----------------------------------------------------------------

    @property
    def occupies(self) -> bool:
        """Whether the pod still holds what it was given: address, GPUs, CPU, memory."""
        return self._outcome is Outcome.GOING

    def update(self, pod: Object) -> None:
        """Takes a newer version of the pod's object."""
        self.pod = pod
        self._writer.saw(pod.get("status") or {})
        for _, _, spec in containers(pod):
            self.containers[spec["name"]].respec(spec)
        self._slow()
        if "deletionTimestamp" in pod["metadata"]:
            self._hurry(float(pod["metadata"].get("deletionGracePeriodSeconds") or 0))
        self._object_changed.set()
        self._wake.set()

    def _slow(self) -> None:
        """As the pod's annotation asks; what cannot be done is said once."""
        sentence, percent = None, 0
        try:
            percent = slow_percent(self.pod)
        except SlowError as error:
            sentence = str(error)
        if sentence not in (None, self._slow_refusal):
            self._services.events.record(self.pod, WARNING, "NotSlowed", str(sentence))
        self._slow_refusal = sentence
        for worker in self.containers.values():
            if worker.view.kind is Kind.MAIN:
                worker.slow(percent)

    def forget(self) -> None:
        """The object is gone from the API: the pod was deleted by force."""
        self._gone = True
        self._hurry(0.0)
        self._wake.set()

    async def run(self) -> None:
        """Runs the pod to its end; returns once nothing of it is left."""
        self._record()
        if self._adopted:
            self._adopt()
        self.update(self.pod)
        tasks = [
            asyncio.create_task(self._writer.run()),
            asyncio.create_task(self._keep_volumes()),
        ]
        try:
            await self._steps()
            await self._finish()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for worker in self.containers.values():
                await worker.close()

    # -- the loop ----------------------------------------------------------------------------

    async def _steps(self) -> None:
        while True:
            self._wake.clear()
            fate = self._fate()
            step = self._due(fate)
            for name in step.start:
                self.containers[name].start()
            for stop in step.stop:
                worker = self.containers[stop.name]
                expiring = fate is not Fate.RUN
                deadline_s = self._stop_deadline_s() if expiring else worker.sick_deadline_s()
                worker.stop(stop.reason, deadline_s)
            if self._outcome in (Outcome.GOING, Outcome.ENDED):
                self._outcome = step.outcome
                self._expired = fate is Fate.EXPIRE and step.outcome is Outcome.FAILED
            self._report()
            if fate is Fate.DELETE and step.outcome is Outcome.ENDED:
                return
            await self._sleep(step)

    def _due(self, fate: Fate) -> Step:
        views = [worker.view for worker in self.containers.values()]
        if fate is Fate.RUN and (self._outcome is not Outcome.GOING or self._places is None):
            return Step(outcome=self._outcome)
        return decide(views, fate, self._clock())

    def _fate(self) -> Fate:
        if self._gone or "deletionTimestamp" in self.pod["metadata"]:
            return Fate.DELETE
        expiry_s = self._expiry_s()
        if self._outcome is Outcome.GOING and expiry_s is not None and self._clock() >= expiry_s:
            return Fate.EXPIRE
        return Fate.RUN

    def _expiry_s(self) -> float | None:
        limit_s = self.pod["spec"].get("activeDeadlineSeconds")
        return None if limit_s is None else self._begun_s + limit_s

    def _stop_deadline_s(self) -> float:
        grace = self._clock() + grace_s(self.pod)
        return grace if self._deadline_s is None else self._deadline_s

    def _hurry(self, left_s: float) -> None:
        """The pod has to end within `left_s`; a second delete may shorten that, never extend."""
        deadline_s = self._clock() + left_s
        if self._deadline_s is None or deadline_s < self._deadline_s:
            self._deadline_s = deadline_s
            for worker in self.containers.values():
                worker.tighten(deadline_s)

    async def _sleep(self, step: Step) -> None:
        times = [at for at in (step.wake_at_s, self._expiry_s()) if at is not None]
        later = [at for at in times if at > self._clock()]
        timeout_s = min(later) - self._clock() if later else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def _report(self) -> None:
        state = PodState(
            self._services.config.node_ip,
            self.ip if self._places is not None or self._adopted else None,
            self._begun_s,
            self._outcome,
            "DeadlineExceeded" if self._expired else None,
            DEADLINE_EXCEEDED if self._expired else None,
        )
        views = [worker.view for worker in self.containers.values()]
        old = self._writer.conditions or (self.pod.get("status") or {}).get("conditions") or []
        self._writer.set(pod_status(self.pod, state, views, old, self._clock()))

    async def _finish(self) -> None:
        if not self._gone:
            await self._writer.settled()
            await self._writer.delete_pod()
        self._volumes.remove()
        if self._services.cgroups is not None:
            self._services.cgroups.remove(self._folder.uid)
        self._folder.remove()

    # -- making things -----------------------------------------------------------------------

    def _make_containers(self) -> dict[str, ContainerWorker]:
        around = Surroundings(
            folder=self._folder,
            pod_ip=self.ip,
            configure=self._configure,
            record=self._event,
            wake=self._wake.set,
            clock=self._clock,
            pod_name=full_name(self.pod),
            grace_s=lambda: grace_s(self.pod),
        )
        return {
            spec["name"]: ContainerWorker(spec, kind, policy, around)
            for kind, policy, spec in containers(self.pod)
        }

    def _event(self, kind: str, reason: str, message: str, container: str) -> None:
        init = self.containers[container].view.kind is not Kind.MAIN
        path = f"spec.{'initContainers' if init else 'containers'}{{{container}}}"
        self._services.events.record(self.pod, kind, reason, message, path)

    def _record(self) -> None:
        indices = {name: [gpu.index for gpu in gpus] for name, gpus in self.gpus.items()}
        self._folder.write(PodRecord(self.pod, self.ip, indices, self._begun_s))

    def _adopt(self) -> None:
        status = self.pod.get("status") or {}
        known = {
            entry["name"]: entry
            for kind in ("initContainerStatuses", "containerStatuses")
            for entry in status.get(kind) or []
        }
        for name, worker in self.containers.items():
            worker.adopt(known.get(name))

    async def _configure(
        self, spec: dict[str, Any], image: Image, run: RunDir, strikes: int
    ) -> ContainerConfig:
        assert self._places is not None, "containers start after their volumes"
        place = PodPlace(self.ip, self.gpus, self._places)
        return await configure(self._services, self.pod, place, spec, image, run, strikes)

    async def _keep_volumes(self) -> None:
        """Makes the volumes, trying until it works, then keeps their contents true."""
        retry_s = FIRST_MOUNT_RETRY_S
        while self._places is None:
            try:
                self._places = await self._volumes.prepare(self.pod)
            except (VolumeError, ApiError, aiohttp.ClientError, TimeoutError) as error:
                message = f"MountVolume.SetUp failed: {error}"
                self._services.events.record(self.pod, WARNING, "FailedMount", message)
                await asyncio.sleep(retry_s)
                retry_s = min(LAST_MOUNT_RETRY_S, retry_s * 2)
        self._wake.set()
        while True:
            self._object_changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._object_changed.wait()
            try:
                await self._volumes.refresh(self.pod)
            except (VolumeError, ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.warning("volumes of %s: %s", full_name(self.pod), error)
