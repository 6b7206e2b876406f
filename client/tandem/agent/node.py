"""The Node object: registration, and the status that says the node is alive.

Only conditions of our own are patched: other writers (a problem detector, a test) keep theirs.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from tandem.agent.api import STRATEGIC_PATCH, Api, ApiError, Listed, Object
from tandem.agent.config import AgentConfig

GPU_RESOURCE: Final = "nvidia.com/gpu"
MAX_PODS: Final = 110
STATUS_PERIOD_S: Final = 300.0
RETRY_S: Final = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the machine a node advertises."""

    cpus: int
    memory_bytes: int
    kernel: str
    os_image: str
    boot_id: str
    machine_id: str

    @classmethod
    def read(cls) -> Machine:
        """This machine."""
        release = platform.freedesktop_os_release()
        return cls(
            cpus=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=platform.release(),
            os_image=release.get("PRETTY_NAME", "Linux"),
            boot_id=_read_text("/proc/sys/kernel/random/boot_id"),
            machine_id=_read_text("/etc/machine-id"),
        )


def timestamp(unix_s: float) -> str:
    """A `metav1.Time`."""
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_timestamp(unix_s: float) -> str:
    """A `metav1.MicroTime`."""
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def capacity(config: AgentConfig, machine: Machine) -> dict[str, str]:
    """The resources that the scheduler may hand out."""
    resources = {
        "cpu": str(machine.cpus),
        "memory": f"{machine.memory_bytes // 1024}Ki",
        "pods": str(MAX_PODS),
    }
    if config.gpus:
        resources[GPU_RESOURCE] = str(len(config.gpus))
    return resources


def labels(config: AgentConfig) -> dict[str, str]:
    """The node's labels: what every kubelet sets, then what the cluster configured."""
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    own = {
        "kubernetes.io/hostname": config.node,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": arch,
        **config.labels,
    }
    if config.gpus:
        own["nvidia.com/gpu.product"] = config.gpus[0].product
    return own


def conditions(now_s: float) -> list[Object]:
    """The four conditions of a kubelet, all well."""
    healthy = [
        ("MemoryPressure", "False", "KubeletHasSufficientMemory", "agent has sufficient memory"),
        ("DiskPressure", "False", "KubeletHasNoDiskPressure", "agent has no disk pressure"),
        ("PIDPressure", "False", "KubeletHasSufficientPID", "agent has sufficient PID available"),
        ("Ready", "True", "KubeletReady", "agent is posting ready status"),
    ]
    return [
        {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": timestamp(now_s),
        }
        for kind, status, reason, message in healthy
    ]


def with_transitions(new: Sequence[Object], old: Sequence[Object], now_s: float) -> list[Object]:
    """`new` with each lastTransitionTime: kept where the status is unchanged, else now."""
    before = {condition["type"]: condition for condition in old}
    return [
        {
            **condition,
            "lastTransitionTime": before[condition["type"]]["lastTransitionTime"]
            if condition["type"] in before
            and before[condition["type"]]["status"] == condition["status"]
            and "lastTransitionTime" in before[condition["type"]]
            else timestamp(now_s),
        }
        for condition in new
    ]


def status(config: AgentConfig, machine: Machine, old: Object, now_s: float) -> Object:
    """The status to patch over `old`.

    Capacity is what there is. Allocatable is written only where nobody wrote it: an unhealthy GPU
    is marked there by whoever found it, and the agent must not heal it by repeating itself.
    """
    resources = capacity(config, machine)
    allocatable = old.get("allocatable") or {}
    return {
        "capacity": resources,
        "allocatable": {name: allocatable.get(name, size) for name, size in resources.items()},
        "conditions": with_transitions(conditions(now_s), old.get("conditions") or [], now_s),
        "addresses": [
            {"type": "InternalIP", "address": config.node_ip},
            {"type": "Hostname", "address": config.node},
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": config.port}},
        # The API server then hands WebSockets of `kubectl exec` on as they are, instead of
        # translating them to SPDY.
        "declaredFeatures": ["ExtendWebSocketsToKubelet"],
        "nodeInfo": {
            "machineID": machine.machine_id,
            "systemUUID": machine.machine_id,
            "bootID": machine.boot_id,
            "kernelVersion": machine.kernel,
            "osImage": machine.os_image,
            "containerRuntimeVersion": f"tandem://{platform.python_version()}",
            "kubeletVersion": f"v{config.kubernetes_version}+tandem",
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": labels(config)["kubernetes.io/arch"],
        },
    }


def speaks_well(node: Object) -> bool:
    """Whether the node's own conditions say what the agent would say."""
    found = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or []}
    return all(found.get(c["type"]) == c["status"] for c in conditions(0.0))


class NodeReporter:
    """Keeps this node's Node object true."""

    def __init__(
        self, api: Api, config: AgentConfig, machine: Machine, clock: Callable[[], float]
    ) -> None:
        self._api = api
        self._config = config
        self._machine = machine
        self._clock = clock
        self._path = f"/api/v1/nodes/{config.node}"

    async def register(self) -> str:
        """Creates the Node, or relabels the one from an earlier life; returns its uid."""
        while True:
            try:
                node = await self._create_or_get()
                await self._report(node)
                return str(node["metadata"]["uid"])
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.warning("registration: %s", error)
                await asyncio.sleep(RETRY_S)

    async def run(self) -> None:
        """Reports every five minutes, and at once when somebody else's word must be put right.

        The controller manager marks a silent node Unknown; it is for the node to say that it is
        back. Between reports the lease says the rest.
        """
        beat = asyncio.create_task(self._beat())
        try:
            selector = {"fieldSelector": f"metadata.name={self._config.node}"}
            async for news in self._api.follow("/api/v1/nodes", selector):
                if isinstance(news, Listed):
                    present, nodes = bool(news.items), news.items
                else:
                    present, nodes = not news.deleted, [news.item]
                if not present:
                    await self.register()
                elif not speaks_well(nodes[0]):
                    await self._try_report()
        finally:
            beat.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            await self._try_report()

    async def _try_report(self) -> None:
        try:
            await self._report(await self._api.get(self._path))
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.warning("node status: %s", error)

    async def _create_or_get(self) -> Object:
        body: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self._config.node, "labels": labels(self._config)},
            "status": status(self._config, self._machine, {}, self._clock()),
        }
        try:
            return await self._api.create("/api/v1/nodes", body)
        except ApiError as error:
            if error.status != 409:
                raise
        return await self._api.patch(self._path, {"metadata": {"labels": labels(self._config)}})

    async def _report(self, node: Object) -> None:
        new = status(self._config, self._machine, node.get("status") or {}, self._clock())
        await self._api.patch(f"{self._path}/status", {"status": new}, STRATEGIC_PATCH)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except FileNotFoundError:
        return ""
