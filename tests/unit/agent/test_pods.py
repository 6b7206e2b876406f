"""The pods of a node, with real containers and an API server that only this test has."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tandem.agent import pods as pods_module
from tandem.agent.api import ApiError, Changed, Listed, Object
from tandem.agent.config import AgentConfig, Gpu
from tandem.agent.events import EventRecorder
from tandem.agent.fields import Host
from tandem.agent.leftovers import end_pod
from tandem.agent.objects import ObjectReader
from tandem.agent.pod import PodWorker
from tandem.agent.pods import Pods
from tandem.agent.services import Services
from tandem.agent.store import Store


class FakeApi:
    """Holds pods; takes their statuses and deletes as an API server does."""

    def __init__(self) -> None:
        self.pods: dict[str, Object] = {}
        self.news: asyncio.Queue[Listed | Changed] = asyncio.Queue()

    async def follow(self, path: str, params: object) -> AsyncIterator[Listed | Changed]:
        self.news = asyncio.Queue()  # A watch begins where the list ends.
        yield Listed(list(self.pods.values()))
        while True:
            yield await self.news.get()

    async def patch(self, path: str, body: Object, *_: object) -> Object:
        pod = self.pods.get(path.split("/")[6])
        if pod is None:
            raise ApiError(404, "NotFound", "")
        pod = {**pod, "status": {**pod.get("status", {}), **body["status"]}}
        self.pods[pod["metadata"]["name"]] = pod
        self.news.put_nowait(Changed(pod, deleted=False))
        return pod

    async def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None:
        pod = self.pods.pop(path.split("/")[6], None)
        if pod is not None:
            self.news.put_nowait(Changed(pod, deleted=True))

    async def create(self, path: str, body: Object) -> Object:
        return body

    async def get(self, path: str) -> Object:
        raise ApiError(404, "NotFound", path)

    def add(self, name: str, uid: str = "", **spec: Any) -> None:
        container = {"name": "c", "image": "tandem.dev/runtime:0.1.0", "command": ["sleep", "600"]}
        given = spec.pop("container", {})
        pod = {
            "metadata": {"name": name, "namespace": "ns", "uid": uid or f"uid-{name}"},
            "spec": {"containers": [{**container, **given}], **spec},
        }
        self.pods[name] = pod
        self.news.put_nowait(Changed(pod, deleted=False))

    def ask_to_delete(self, name: str, grace_s: int = 1) -> None:
        pod = self.pods[name]
        going = {"deletionTimestamp": "now", "deletionGracePeriodSeconds": grace_s}
        self.pods[name] = {**pod, "metadata": {**pod["metadata"], **going}}
        self.news.put_nowait(Changed(self.pods[name], deleted=False))

    def status(self, name: str) -> Object:
        found: Object = self.pods.get(name, {}).get("status", {})
        return found


class Node:
    """A node under test; `restart` is a new agent on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.api = FakeApi()
        self.folder = folder
        self.pods: Pods
        self._task: asyncio.Task[None] | None = None

    async def restart(self) -> None:
        await self.stop()
        api: Any = self.api
        config = AgentConfig(
            node="node-1", node_ip="127.0.0.1", pod_network="127.99.1.0/24", port=0, labels={},
            gpus=tuple(Gpu(index, "x") for index in range(4)), folder=str(self.folder),
            state_home=str(self.folder), api_host="127.0.0.1", api_port=0, ca="",
            client_certificate="", client_key="", server_certificate="", server_key="",
            cluster=f"test-{os.getpid()}", kubernetes_version="1.36.3",
        )  # fmt: skip
        services = Services(
            api=api,
            config=config,
            host=Host("node-1", "127.0.0.1", 2, 2**33),
            store=Store(self.folder),
            events=EventRecorder(api, "node-1", time.time),
            objects=ObjectReader(api),
            cgroups=None,
            clock=time.time,
        )
        capacity = {"pods": "10", "nvidia.com/gpu": "4", "cpu": "2"}
        self.pods = Pods(services, capacity, {})
        self._task = asyncio.create_task(self.pods.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path / "node")
    await node.restart()
    yield node
    await node.stop()
    for pod in Store(node.folder).pods():
        await asyncio.to_thread(end_pod, pod, 0.1)


async def until(test: Callable[[], Any]) -> Any:
    async with asyncio.timeout(20):
        while not (result := test()):  # noqa: ASYNC110 (what happens, happens in other processes)
            await asyncio.sleep(0.02)
    return result


def is_ready(node: Node, name: str) -> bool:
    entries = node.api.status(name).get("containerStatuses") or [{}]
    return bool(entries[0].get("ready"))


async def test_pods_come_and_go(node: Node) -> None:
    node.api.add("a")
    node.api.add("b")
    await until(lambda: is_ready(node, "a") and is_ready(node, "b"))
    addresses = {node.api.status(name)["podIP"] for name in ("a", "b")}
    assert len(addresses) == 2
    assert "127.99.1.1" not in {node.api.status("a")["hostIP"]}
    node.api.ask_to_delete("a")
    await until(lambda: "a" not in node.api.pods)
    await until(lambda: [pod.uid for pod in Store(node.folder).pods()] == ["uid-b"])
    assert is_ready(node, "b")


async def test_gpus_are_taken_and_given_back(node: Node) -> None:
    def gpus(count: int) -> dict[str, Any]:
        return {"resources": {"limits": {"nvidia.com/gpu": str(count)}}}

    node.api.add("a", container=gpus(3))
    await until(lambda: is_ready(node, "a"))
    node.api.add("b", container=gpus(2))
    refused = await until(lambda: node.api.status("b").get("reason"))
    assert refused == "OutOfnvidia.com/gpu"
    node.api.ask_to_delete("a")
    node.api.ask_to_delete("b")
    await until(lambda: not node.api.pods)
    node.api.add("c", container=gpus(4))
    await until(lambda: is_ready(node, "c"))
    record = Store(node.folder).pod("uid-c").read()
    assert record is not None
    assert record.gpus == {"c": [0, 1, 2, 3]}


async def test_two_pods_of_one_name_are_two_pods(node: Node) -> None:
    """The old one is still ending when the new one comes: a StatefulSet does that."""
    node.api.add("a", uid="old")
    await until(lambda: is_ready(node, "a"))
    old = node.api.pods["a"]
    node.api.news.put_nowait(Changed(old, deleted=True))
    node.api.pods.pop("a")
    node.api.add("a", uid="new")
    await until(lambda: is_ready(node, "a"))
    await until(lambda: [pod.uid for pod in Store(node.folder).pods()] == ["new"])
    found = node.pods.find("ns", "a")
    assert found is not None
    assert found["metadata"]["uid"] == "new"


async def test_a_pod_whose_worker_failed_is_taken_up_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours costs the pod nothing: its container runs on and is adopted."""
    monkeypatch.setattr(pods_module, "RETRY_S", 0.05)
    node.api.add("a")
    await until(lambda: is_ready(node, "a"))
    container = node.api.status("a")["containerStatuses"][0]["containerID"]
    faults = iter([RuntimeError("a bug")])
    healthy = PodWorker._report

    def fails_once(worker: PodWorker) -> None:
        for fault in faults:
            raise fault
        healthy(worker)

    monkeypatch.setattr(PodWorker, "_report", fails_once)
    first = node.pods.workers["uid-a"]
    first.update(node.api.pods["a"])
    await until(lambda: node.pods.workers.get("uid-a") not in (None, first))
    await until(lambda: is_ready(node, "a"))
    entry = node.api.status("a")["containerStatuses"][0]
    assert (entry["containerID"], entry["restartCount"]) == (container, 0)


async def test_a_new_agent_takes_over(node: Node) -> None:
    node.api.add("kept", container={"resources": {"limits": {"nvidia.com/gpu": "2"}}})
    node.api.add("gone")
    await until(lambda: is_ready(node, "kept") and is_ready(node, "gone"))
    address = node.api.status("kept")["podIP"]
    await node.stop()
    node.api.pods.pop("gone")
    await node.restart()
    await until(lambda: [pod.uid for pod in Store(node.folder).pods()] == ["uid-kept"])
    worker = await until(lambda: node.pods.workers.get("uid-kept"))
    assert (worker.ip, [gpu.index for gpu in worker.gpus["c"]]) == (address, [0, 1])
    node.api.add("more", container={"resources": {"limits": {"nvidia.com/gpu": "2"}}})
    await until(lambda: is_ready(node, "more"))
    record = Store(node.folder).pod("uid-more").read()
    assert record is not None
    assert record.gpus == {"c": [2, 3]}
