"""The pods of this node: who is here, who comes, who goes.

Follows the pods bound to the node, gives each an address and its GPUs, and runs a worker for it.
At the start it takes over what an earlier agent left: running containers are adopted with their
pods, those whose pod is gone are ended.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Coroutine, Iterator
from typing import Any, Final

from tandem.agent.admission import Refusal, refuse
from tandem.agent.api import Changed, Listed, Object
from tandem.agent.config import AgentConfig, Gpu
from tandem.agent.events import WARNING
from tandem.agent.leftovers import end_pod
from tandem.agent.node import GPU_RESOURCE
from tandem.agent.pod import PodWorker
from tandem.agent.podspec import containers, full_name, is_over
from tandem.agent.quantity import whole
from tandem.agent.reporting import StatusWriter
from tandem.agent.services import Services
from tandem.agent.status import rejection

log = logging.getLogger(__name__)

LEFTOVER_GRACE_S: Final = 5.0
RETRY_S: Final = 5.0


class Pods:
    """The workers of this node's pods, by uid."""

    def __init__(
        self, services: Services, capacity: dict[str, str], labels: dict[str, str]
    ) -> None:
        self.workers: dict[str, PodWorker] = {}
        self._here: dict[str, Object] = {}
        self._services = services
        self._capacity = capacity
        self._labels = {**labels, "metadata.name": services.config.node}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._refused: set[str] = set()
        self._addresses = _addresses(services.config)

    async def run(self) -> None:
        """Follows the node's pods for ever."""
        selector = {"fieldSelector": f"spec.nodeName={self._services.config.node}"}
        first = True
        try:
            async for news in self._services.api.follow("/api/v1/pods", selector):
                if isinstance(news, Changed):
                    self._take(news.item, deleted=news.deleted)
                    continue
                if first:
                    await self._take_over(news)
                    first = False
                here = {pod["metadata"]["uid"] for pod in news.items}
                for uid in [uid for uid in self._here if uid not in here]:
                    self._take(self._here[uid], deleted=True)
                for pod in news.items:
                    self._take(pod, deleted=False)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def find(self, namespace: str, name: str) -> Object | None:
        """The pod of that name; of two, the one that is not being deleted."""
        found = [
            pod
            for pod in self._here.values()
            if pod["metadata"]["name"] == name and pod["metadata"]["namespace"] == namespace
        ]
        found.sort(key=lambda pod: "deletionTimestamp" in pod["metadata"])
        return found[0] if found else None

    # -- coming and going --------------------------------------------------------------------

    def _take(self, pod: Object, *, deleted: bool) -> None:
        uid = pod["metadata"]["uid"]
        worker = self.workers.get(uid)
        if deleted:
            self._here.pop(uid, None)
            self._refused.discard(uid)
            if worker is not None:
                worker.forget()
            else:
                self._services.store.pod(uid).remove()
            return
        self._here[uid] = pod
        if worker is not None:
            worker.update(pod)
        elif is_over(pod) or uid in self._refused:
            self._finish_terminal(pod)
        elif "deletionTimestamp" in pod["metadata"]:
            self._run(PodWorker(self._services, pod, self._next_address(), {}))
        else:
            self._admit(pod)

    def _admit(self, pod: Object) -> None:
        others = [worker.pod for worker in self.workers.values() if worker.occupies]
        refusal = refuse(pod, others, self._capacity, self._labels)
        if refusal is not None:
            self._refuse(pod, refusal)
            return
        self._run(PodWorker(self._services, pod, self._next_address(), self._take_gpus(pod)))

    def _refuse(self, pod: Object, refusal: Refusal) -> None:
        uid = pod["metadata"]["uid"]
        self._refused.add(uid)
        self._services.events.record(pod, WARNING, refusal.reason, refusal.message)
        status = rejection(refusal.reason, refusal.message, self._services.clock())
        writer = StatusWriter(self._services.api, pod)
        writer.set(status)
        self._keep(f"{uid}/refusal", self._write_once(writer))

    def _finish_terminal(self, pod: Object) -> None:
        """A pod that is over needs nothing but, once asked for, its removal."""
        uid = pod["metadata"]["uid"]
        if "deletionTimestamp" in pod["metadata"] and f"{uid}/end" not in self._tasks:
            self._keep(f"{uid}/end", StatusWriter(self._services.api, pod).delete_pod())

    async def _write_once(self, writer: StatusWriter) -> None:
        task = asyncio.create_task(writer.run())
        try:
            await writer.settled()
        finally:
            task.cancel()

    def _run(self, worker: PodWorker) -> None:
        uid = worker.pod["metadata"]["uid"]
        self.workers[uid] = worker
        self._keep(uid, worker.run())

    def _keep(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))

    def _ended(self, key: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(key, None)
        self.workers.pop(key, None)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", key, exc_info=error)
            asyncio.get_running_loop().call_later(RETRY_S, self._try_again, key)

    def _try_again(self, uid: str) -> None:
        """Takes a pod up again whose worker failed, as if an earlier agent had left it."""
        pod = self._here.get(uid)
        if pod is not None and uid not in self.workers and not self._adopt(pod):
            self._take(pod, deleted=False)

    # -- what pods are given -----------------------------------------------------------------

    def _next_address(self) -> str:
        used = {worker.ip for worker in self.workers.values()}
        return next(address for address in self._addresses if address not in used)

    def _take_gpus(self, pod: Object) -> dict[str, list[Gpu]]:
        taken = {
            gpu.index
            for worker in self.workers.values()
            if worker.occupies
            for gpus in worker.gpus.values()
            for gpu in gpus
        }
        free = [gpu for gpu in self._services.config.gpus if gpu.index not in taken]
        given = {}
        for _, _, container in containers(pod):
            limits = (container.get("resources") or {}).get("limits") or {}
            if count := whole(limits.get(GPU_RESOURCE, "0")):
                given[container["name"]], free = free[:count], free[count:]
        return given

    # -- taking over -------------------------------------------------------------------------

    async def _take_over(self, listing: Listed) -> None:
        """Adopts the pods of an earlier agent, and ends what is left of those that are gone."""
        here = {pod["metadata"]["uid"]: pod for pod in listing.items}
        for folder in self._services.store.pods():
            pod = here.get(folder.uid)
            if pod is not None and not is_over(pod) and self._adopt(pod):
                continue
            log.info("ending what is left of pod %s", folder.uid)
            await asyncio.to_thread(end_pod, folder, LEFTOVER_GRACE_S)
            if pod is None:
                folder.remove()

    def _adopt(self, pod: Object) -> bool:
        """Runs a pod from its record; False when there is none."""
        record = self._services.store.pod(pod["metadata"]["uid"]).read()
        if record is None:
            return False
        log.info("adopting pod %s", full_name(pod))
        gpus = {gpu.index: gpu for gpu in self._services.config.gpus}
        given = {
            name: [gpus[index] for index in indices if index in gpus]
            for name, indices in record.gpus.items()
        }
        self._run(PodWorker(self._services, pod, record.ip, given, begun_s=record.begun_at_s))
        return True


def _addresses(config: AgentConfig) -> Iterator[str]:
    """The pod network's addresses, again and again: a freed one is taken again last."""
    network = ipaddress.ip_network(config.pod_network)
    usable = [str(address) for address in network.hosts() if str(address) != config.node_ip]
    while True:
        yield from usable
