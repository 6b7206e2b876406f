"""Which pods' streams are to move elsewhere, and how many of each pod do so at once."""

from __future__ import annotations

from collections import Counter
from typing import Final

from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.health import PodHealth
from tandem_runtime.gateway.loops import repeat
from tandem_runtime.gateway.pod_client import PodClient

PERIOD_S: Final = 0.2
AT_ONCE: Final = 4
"""Streams of one pod: the others go on undisturbed until it is their turn."""


class Moves:
    def __init__(self, discovery: Discovery, client: PodClient, health: PodHealth) -> None:
        self._discovery = discovery
        self._client = client
        self._health = health
        self._leaving: frozenset[str] = frozenset()
        self._moving: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled."""
        await repeat("looking for pods that drain", self.round, PERIOD_S)

    async def round(self) -> None:
        """Pods that streams of ours run on and that are being deleted, emptied, or say so."""
        ours, says_so = self._client.live_uids, self._health.draining
        self._leaving = frozenset(
            pod.uid
            for pod in self._discovery.pods
            if pod.uid in ours and (pod.leaving or pod.uid in says_so)
        )

    def due(self, uid: str) -> bool:
        """Whether this pod's streams are to move."""
        return uid in self._leaving

    def begin(self, uid: str) -> bool:
        """Whether one more stream of the pod may move now; `end` gives its place to another."""
        if self._moving[uid] >= AT_ONCE:
            return False
        self._moving[uid] += 1
        return True

    def end(self, uid: str) -> None:
        self._moving[uid] -= 1
        if not self._moving[uid]:
            del self._moving[uid]
