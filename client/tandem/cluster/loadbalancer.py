"""The local cloud's load balancer: Services of type LoadBalancer answer on 127.0.0.1.

`python -m tandem.cluster.loadbalancer` gives such a Service the address 127.0.0.1 and forwards
each of its TCP node ports there to a Ready pod of its selector: round robin by connection, the
next pod when one refuses, none that is terminating. Connections that exist are left alone when
their pod stops being Ready. It has an identity of its own that may do just this.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from tandem_runtime import contract

from tandem.agent.api import Api, ApiError, Changed, Credentials, Listed, Object

ADDRESS: Final = "127.0.0.1"
CONNECT_TIMEOUT_S: Final = 2.0
BUFFER_BYTES: Final = 64 * 1024
RETRY_S: Final = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Port:
    """One forwarded port of a Service."""

    name: str
    node_port: int
    target: int | str
    """A number, or the name of a port of the pod's containers."""


@dataclass(frozen=True, slots=True)
class Balanced:
    """What of a Service matters here."""

    namespace: str
    name: str
    selector: Mapping[str, str]
    ports: tuple[Port, ...]


def balanced(service: Object) -> Balanced | None:
    """The Service, if it is one of ours: type LoadBalancer, with a selector, allocated ports."""
    spec = service["spec"]
    if spec.get("type") != "LoadBalancer" or not spec.get("selector"):
        return None
    if "deletionTimestamp" in service["metadata"]:
        return None
    ports = tuple(
        Port(port.get("name") or "", port["nodePort"], port.get("targetPort") or port["port"])
        for port in spec["ports"]
        if port.get("nodePort") and port.get("protocol", "TCP") == "TCP"
    )
    metadata = service["metadata"]
    return Balanced(metadata["namespace"], metadata["name"], spec["selector"], ports)


def external_url(service: Balanced) -> str | None:
    """HOST:PORT of the port named `http`; the first port where none has that name."""
    named = [port for port in service.ports if port.name == "http"] or list(service.ports)
    return f"{ADDRESS}:{named[0].node_port}" if named else None


def backends(pods: Sequence[Object], service: Balanced, port: Port) -> list[tuple[str, int]]:
    """Where new connections may go: Ready pods of the selector that are not terminating."""
    found = []
    for pod in pods:
        labels = pod["metadata"].get("labels") or {}
        if any(labels.get(key) != value for key, value in service.selector.items()):
            continue
        if "deletionTimestamp" in pod["metadata"] or not _is_ready(pod):
            continue
        number = _port_number(pod, port.target)
        if number is not None:
            found.append((pod["status"]["podIP"], number))
    return sorted(found)


def _is_ready(pod: Object) -> bool:
    status = pod.get("status") or {}
    conditions = status.get("conditions") or []
    return bool(status.get("podIP")) and any(
        c["type"] == "Ready" and c["status"] == "True" for c in conditions
    )


def _port_number(pod: Object, target: int | str) -> int | None:
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or []:
            if port.get("name") == target:
                return int(port["containerPort"])
    return None


class LoadBalancer:
    """Follows Services and pods, and keeps a listening socket for each forwarded port."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._services: dict[str, Balanced] = {}
        self._written: dict[str, int] = {}
        self._pods: dict[str, Object] = {}
        self._servers: dict[tuple[str, Port], asyncio.Server] = {}
        self._turns: Iterator[int] = itertools.count()
        self._pods_task: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follows the cluster's Services for ever."""
        async for news in self._api.follow("/api/v1/services"):
            if isinstance(news, Listed):
                here = {service["metadata"]["uid"] for service in news.items}
                for uid in [uid for uid in self._services if uid not in here]:
                    await self._drop(uid)
                for service in news.items:
                    await self._take(service)
            elif news.deleted:
                await self._drop(news.item["metadata"]["uid"])
            else:
                await self._take(news.item)

    async def _take(self, item: Object) -> None:
        uid = item["metadata"]["uid"]
        service = balanced(item)
        if service is None:
            await self._drop(uid)
            return
        if self._services.get(uid) != service:
            await self._drop(uid)
            self._services[uid] = service
            for port in service.ports:
                await self._listen(uid, service, port)
            if self._pods_task is None:
                self._pods_task = asyncio.create_task(self._follow_pods())
        await self._announce(item, service)

    async def _drop(self, uid: str) -> None:
        self._services.pop(uid, None)
        self._written.pop(uid, None)
        for key in [key for key in self._servers if key[0] == uid]:
            self._servers.pop(key).close()

    async def _listen(self, uid: str, service: Balanced, port: Port) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._forward(service, port, reader, writer)

        try:
            server = await asyncio.start_server(serve, ADDRESS, port.node_port, limit=BUFFER_BYTES)
        except OSError as error:
            log.error("%s/%s: port %s: %s", service.namespace, service.name, port.node_port, error)
            return
        self._servers[uid, port] = server

    async def _announce(self, item: Object, service: Balanced) -> None:
        """Writes the address into the Service, as a cloud does, unless it is there already."""
        metadata = item["metadata"]
        if int(metadata["resourceVersion"]) < self._written.get(metadata["uid"], 0):
            return  # What we wrote is newer than this news.
        path = f"/api/v1/namespaces/{service.namespace}/services/{service.name}"
        ingress = [{"ip": ADDRESS, "ipMode": "Proxy"}]
        url = external_url(service)
        annotations = metadata.get("annotations") or {}
        status = (item.get("status") or {}).get("loadBalancer") or {}
        try:
            if status.get("ingress") != ingress:
                body: Object = {"status": {"loadBalancer": {"ingress": ingress}}}
                item = await self._api.patch(f"{path}/status", body)
            if url is not None and annotations.get(contract.ANNOTATION_EXTERNAL_URL) != url:
                change = {contract.ANNOTATION_EXTERNAL_URL: url}
                item = await self._api.patch(path, {"metadata": {"annotations": change}})
            self._written[metadata["uid"]] = int(item["metadata"]["resourceVersion"])
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s/%s: %s", service.namespace, service.name, error)

    async def _follow_pods(self) -> None:
        async for news in self._api.follow("/api/v1/pods"):
            if isinstance(news, Listed):
                self._pods = {pod["metadata"]["uid"]: pod for pod in news.items}
            elif isinstance(news, Changed):
                uid = news.item["metadata"]["uid"]
                if news.deleted:
                    self._pods.pop(uid, None)
                else:
                    self._pods[uid] = news.item

    async def _forward(
        self,
        service: Balanced,
        port: Port,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        upstream = await self._connect(service, port)
        if upstream is None:
            # Nobody is Ready: a closed connection, as from a load balancer without targets.
            writer.transport.abort()
            return
        up_reader, up_writer = upstream
        try:
            await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))
        finally:
            for side in (writer, up_writer):
                side.close()

    async def _connect(
        self, service: Balanced, port: Port
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        pods = [
            pod for pod in self._pods.values() if pod["metadata"]["namespace"] == service.namespace
        ]
        targets = backends(pods, service, port)
        first = next(self._turns)
        for offset in range(len(targets)):
            host, number = targets[(first + offset) % len(targets)]
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(host, number, limit=BUFFER_BYTES)
        return None


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies one direction; its end is passed on as a half-close."""
    try:
        while data := await reader.read(BUFFER_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.transport.abort()


async def serve(credentials: Credentials) -> None:
    """Runs until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Api.connect(credentials, user_agent="tandem-load-balancer") as api:
        task = asyncio.create_task(LoadBalancer(api).run())
        await asyncio.wait(
            {task, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            task.result()
        task.cancel()


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--server", required=True)
    for name in ("--ca", "--certificate", "--key"):
        parser.add_argument(name, required=True, type=Path)
    given: Any = parser.parse_args()
    asyncio.run(serve(Credentials(given.server, given.ca, given.certificate, given.key)))


if __name__ == "__main__":
    main()
