"""One container with real processes, and surroundings that are only this test."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tandem.agent import runtime
from tandem.agent.container import ContainerWorker, Surroundings
from tandem.agent.images import Image, image_paths
from tandem.agent.lifecycle import Kind, Policy
from tandem.agent.store import ContainerConfig, PodDir, RunDir

SPEC: dict[str, Any] = {"name": "c", "image": "tandem.dev/runtime:0.1.0"}


class Pod:
    """What a container sees of its pod."""

    def __init__(self, folder: PodDir) -> None:
        self.folder = folder
        self.events: list[tuple[str, str]] = []
        self.changed = asyncio.Event()
        self.workers: list[ContainerWorker] = []

    def worker(self, script: str = "exec sleep 600", **changes: Any) -> ContainerWorker:
        spec = {**SPEC, "command": ["sh", "-c", script], **changes}
        around = Surroundings(
            folder=self.folder,
            pod_ip="127.0.0.1",
            pod_name="p_ns(u)",
            grace_s=lambda: 5.0,
            configure=self.configure,
            record=lambda kind, reason, message, name: self.events.append((reason, message)),
            wake=self.changed.set,
            clock=time.time,
        )
        self.workers.append(ContainerWorker(spec, Kind.MAIN, Policy.ALWAYS, around))
        return self.workers[-1]

    async def configure(
        self, spec: dict[str, Any], image: Image, run: RunDir, strikes: int
    ) -> ContainerConfig:
        return ContainerConfig(
            argv=spec["command"],
            env={"PATH": "/usr/bin:/bin"},
            working_dir="/",
            hostname="p",
            log=str(run.log),
            mounts=[],
            private=["/tmp"],
            image_paths=image_paths(),
            devices=[],
            cgroups=[],
            read_only_root=False,
            rootless=os.geteuid() != 0,
            strikes=strikes,
            termination_log="",
        )

    async def until(self, test: Callable[[], object]) -> None:
        """Waits for a change of the container that makes `test` true."""
        async with asyncio.timeout(15):
            while not test():
                self.changed.clear()
                await self.changed.wait()

    async def start(self, worker: ContainerWorker) -> None:
        worker.start()
        assert worker.view.busy
        await self.until(lambda: not worker.view.busy)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[Pod]:
    pod = Pod(PodDir(tmp_path / "pods" / "u"))
    yield pod
    for worker in pod.workers:
        await worker.close()
    for run in pod.folder.all_runs():
        started = run.started()
        if started is not None:
            runtime.kill(started)
            await runtime.wait(run, started)


async def test_a_run_from_start_to_end(pod: Pod) -> None:
    worker = pod.worker()
    await pod.start(worker)
    await pod.until(lambda: worker.view.ready)
    assert worker.view.running
    worker.stop("because", time.time() + 5)
    await pod.until(lambda: not worker.view.busy)
    assert worker.view.latest is not None
    assert worker.view.latest.exit is not None
    assert worker.view.latest.exit.code in (137, 143)
    assert not worker.view.ready
    assert [reason for reason, _ in pod.events] == ["Pulled", "Created", "Started", "Killing"]


async def test_a_successor_adopts_a_run_that_was_never_reported(pod: Pod) -> None:
    """The agent was killed between the start and the first status: the API knows nothing."""
    first = pod.worker()
    await pod.start(first)
    await first.close()
    second = pod.worker()
    second.adopt(None)
    assert second.view.running
    assert second.view.latest == first.view.latest
    assert second.view.started
    assert second.view.ready


async def test_a_successor_goes_on_where_the_startup_probe_was(pod: Pod) -> None:
    probe = {"startupProbe": {"exec": {"command": ["true"]}, "initialDelaySeconds": 600}}
    first = pod.worker(**probe)
    await pod.start(first)
    await first.close()
    unknown = pod.worker(**probe)
    unknown.adopt(None)
    assert not unknown.view.started
    await unknown.close()
    assert first.view.latest is not None
    known = pod.worker(**probe)
    known.adopt({"containerID": first.view.latest.container_id, "started": True, "ready": True})
    assert known.view.started


async def test_a_successor_reads_how_it_ended(pod: Pod) -> None:
    first = pod.worker("exit 3")
    await pod.start(first)
    await pod.until(lambda: not first.view.running)
    await first.close()
    second = pod.worker()
    second.adopt(None)
    assert second.view.latest == first.view.latest


async def test_restarts_are_counted_and_remembered(pod: Pod) -> None:
    worker = pod.worker("exit 3")
    for number in range(3):
        await pod.start(worker)
        await pod.until(lambda: not worker.view.running)
        latest = worker.view.latest
        assert latest is not None
        assert (latest.number, latest.strikes) == (number, number)
    assert worker.view.previous is not None
    assert worker.view.previous.number == 1
    successor = pod.worker()
    successor.adopt(None)
    assert successor.view.latest == worker.view.latest
    assert successor.view.previous == worker.view.previous


async def test_a_failed_post_start_hook_makes_it_sick(pod: Pod) -> None:
    hook = {"lifecycle": {"postStart": {"exec": {"command": ["false"]}}}}
    worker = pod.worker(**hook)
    await pod.start(worker)
    await pod.until(lambda: worker.view.unhealthy)
    assert not worker.view.ready
    assert "FailedPostStartHook" in [reason for reason, _ in pod.events]


async def test_a_container_that_is_ending_is_not_probed_for_life(pod: Pod) -> None:
    probe = {"exec": {"command": ["false"]}, "periodSeconds": 1, "failureThreshold": 1}
    script = "trap '' TERM; while :; do sleep 0.05; done"
    slow = {"preStop": {"sleep": {"seconds": 2}}}
    delayed = {**probe, "initialDelaySeconds": 1}
    worker = pod.worker(script, livenessProbe=delayed, lifecycle=slow)
    await pod.start(worker)
    worker.stop("because", time.time() + 2)
    await pod.until(lambda: not worker.view.busy)
    assert "Unhealthy" not in [reason for reason, _ in pod.events]


async def test_an_error_of_ours_is_on_record_and_tried_again(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(runtime, "start", broken)
    worker = pod.worker()
    await pod.start(worker)
    assert worker.view.waiting is not None
    assert worker.view.waiting.message == "OSError: no space left on device"
    assert worker.view.due_at_s() == worker.view.waiting.retry_at_s
