"""Events about pods, as a kubelet reports them. A repeated one raises the count of the first.

Reporting never blocks and never fails its caller: Events are news, not state.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import aiohttp

from tandem.agent.api import Api, ApiError, Object
from tandem.agent.node import timestamp

KEPT: Final = 1024
NORMAL: Final = "Normal"
WARNING: Final = "Warning"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Series:
    count: int
    first_s: float


class EventRecorder:
    """Posts Events in order, one at a time."""

    def __init__(self, api: Api, node: str, clock: Callable[[], float]) -> None:
        self._api = api
        self._node = node
        self._clock = clock
        self._series: OrderedDict[str, _Series] = OrderedDict()
        self._queue: asyncio.Queue[tuple[Object, bool]] = asyncio.Queue(maxsize=KEPT)

    def record(
        self, pod: Object, kind: str, reason: str, message: str, field_path: str | None = None
    ) -> None:
        """Reports that something happened to `pod`, or to the container at `field_path`."""
        metadata = pod["metadata"]
        now_s = self._clock()
        key = "\0".join((metadata["uid"], kind, reason, message, field_path or ""))
        series = self._series.setdefault(key, _Series(0, now_s))
        self._series.move_to_end(key)
        series.count += 1
        if len(self._series) > KEPT:
            self._series.popitem(last=False)
        involved = {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        if field_path:
            involved["fieldPath"] = field_path
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{metadata['name']}.{hashlib.sha256(key.encode()).hexdigest()[:16]}",
                "namespace": metadata["namespace"],
            },
            "involvedObject": involved,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self._node},
            "reportingComponent": "kubelet",
            "reportingInstance": self._node,
            "firstTimestamp": timestamp(series.first_s),
            "lastTimestamp": timestamp(now_s),
            "count": series.count,
        }
        try:
            self._queue.put_nowait((event, series.count > 1))
        except asyncio.QueueFull:
            log.warning("too many events wait: dropped %s of %s", reason, metadata["name"])

    async def run(self) -> None:
        """Posts what was recorded, for ever."""
        while True:
            event, repeated = await self._queue.get()
            try:
                await self._post(event, repeated)
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.info("event %s: %s", event["reason"], error)

    async def _post(self, event: Object, repeated: bool) -> None:
        folder = f"/api/v1/namespaces/{event['metadata']['namespace']}/events"
        path = f"{folder}/{event['metadata']['name']}"
        change = {key: event[key] for key in ("count", "lastTimestamp", "message")}
        if repeated:
            try:
                await self._api.patch(path, change)
                return
            except ApiError as error:
                if error.status != 404:
                    raise
        try:
            await self._api.create(folder, event)
        except ApiError as error:
            # The name is a hash of the message: an agent before this one reported the same.
            if error.status != 409:
                raise
            await self._api.patch(path, change)
