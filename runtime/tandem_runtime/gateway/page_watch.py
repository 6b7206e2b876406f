"""Reads from each pod what pages it holds, one question after the other (`PATH_PAGES`)."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.loops import repeat
from tandem_runtime.gateway.pages import PagesHeld
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView

log = logging.getLogger(__name__)

PERIOD_S: Final = 1.0
_RETRY_S: Final = 2.0


class PageWatch:
    def __init__(self, discovery: Discovery, client: PodClient) -> None:
        self.held = PagesHeld()
        self._discovery = discovery
        self._client = client
        self._readers: dict[str, asyncio.Task[None]] = {}
        """By pod uid."""

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await repeat("a round over pods' pages", self.round, PERIOD_S)
        finally:
            for reader in self._readers.values():
                reader.cancel()
            await asyncio.gather(*self._readers.values(), return_exceptions=True)

    async def round(self) -> None:
        """Begin to read from new pods, and forget those that are gone."""
        pods = {pod.uid: pod for pod in self._discovery.pods if pod.ready}
        for uid in self._readers.keys() - pods.keys():
            self._readers.pop(uid).cancel()
            self.held.drop(uid)
        for uid, pod in pods.items():
            if uid not in self._readers or self._readers[uid].done():
                self._readers[uid] = asyncio.create_task(self._read(pod))

    async def _read(self, pod: PodView) -> None:
        while True:
            try:
                events = await self._client.pages(pod, *self.held.position(pod.uid))
            except PodUnreachable as error:
                # Also a pod of a version that does not tell: then it is guessed.
                log.debug("%s", error)
                self.held.drop(pod.uid)
                await asyncio.sleep(_RETRY_S)
            else:
                self.held.apply(pod.uid, events)
