"""Writing a pod's status: the latest wins, and the API being away only delays it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import aiohttp

from tandem.agent.api import STRATEGIC_PATCH, Api, ApiError, Object

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 10.0

log = logging.getLogger(__name__)


class StatusWriter:
    """Patches the status of one pod, never of another with the same name."""

    def __init__(self, api: Api, pod: Object) -> None:
        metadata = pod["metadata"]
        self._api = api
        self._uid = metadata["uid"]
        self.path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        self._wanted: Object | None = None
        self._written: Object | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()

    def set(self, status: Object) -> None:
        """Asks for `status` to be written, unless it is what was asked for last."""
        if status != self._wanted:
            self._wanted = status
            self._changed.set()
            self._settled.clear()

    def saw(self, live: Object) -> None:
        """Takes note of a status that the API has. The control plane marks the pods of a silent
        node as not Ready, and leaves it to the node to take that back."""
        mine = _statuses(self._written)
        theirs = _statuses(live)
        if any(theirs.get(type_) != status for type_, status in mine.items()):
            self._written = None
            self._changed.set()
            self._settled.clear()

    @property
    def conditions(self) -> list[Object]:
        """The conditions last asked for; they hold the transition times."""
        return list((self._wanted or {}).get("conditions") or [])

    async def settled(self) -> None:
        """Returns once the latest status has been written, or its pod is gone."""
        await self._settled.wait()

    async def run(self) -> None:
        """Writes for ever."""
        retry_s = FIRST_RETRY_S
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = self._wanted
            try:
                if wanted != self._written:
                    body: Object = {"metadata": {"uid": self._uid}, "status": wanted}
                    await self._api.patch(f"{self.path}/status", body, STRATEGIC_PATCH)
                self._written = wanted
            except ApiError as error:
                # 404: it is gone. 409: a pod with this name and another uid. Neither is ours.
                if error.status not in (404, 409):
                    log.warning("status of %s: %s", self.path, error)
                    if error.status not in (400, 422):
                        retry_s = await self._retry(retry_s)
                        continue
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("status of %s: %s", self.path, error)
                retry_s = await self._retry(retry_s)
                continue
            retry_s = FIRST_RETRY_S
            if not self._changed.is_set():
                self._settled.set()

    async def _retry(self, retry_s: float) -> float:
        await asyncio.sleep(retry_s)
        self._changed.set()
        return min(LAST_RETRY_S, retry_s * 2)

    async def delete_pod(self) -> None:
        """Removes the pod's object for good, once nothing of it runs."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                await self._api.delete(self.path, uid=self._uid, grace_s=0)
                return
            except ApiError as error:
                if error.status in (404, 409):
                    return
                log.warning("delete of %s: %s", self.path, error)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("delete of %s: %s", self.path, error)
            await asyncio.sleep(retry_s)
            retry_s = min(LAST_RETRY_S, retry_s * 2)


def _statuses(status: Object | None) -> dict[str, str]:
    """The conditions of a pod's status, by type."""
    return {c["type"]: c["status"] for c in (status or {}).get("conditions") or ()}
