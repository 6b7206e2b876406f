"""Which pods can be used, beyond what the Kubernetes API says: their own state, read often.

A pod that has said nothing for a while is left alone and its streams are cut, so that they move on;
so are the streams of a pod that the API no longer knows. A pod's stream events count as signs of
life, so a busy pod that answers its state slowly is not taken for dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.load import Loads
from tandem_runtime.gateway.loops import repeat
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView

log = logging.getLogger(__name__)

PERIOD_S: Final = 2.0
SILENCE_S: Final = 10.0


class PodHealth:
    def __init__(
        self,
        discovery: Discovery,
        client: PodClient,
        loads: Loads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._discovery = discovery
        self._client = client
        self._loads = loads
        self._clock = clock
        self._heard_s: dict[str, float] = {}
        self._unanswered: set[str] = set()
        self._draining: set[str] = set()
        self._context_tokens: dict[str, int] = {}
        self.unusable: frozenset[str] = frozenset()
        """Uids of pods that are silent, or that say they are draining."""

    @property
    def draining(self) -> frozenset[str]:
        """Uids of pods that say they are draining."""
        return frozenset(self._draining)

    async def run(self) -> None:
        """Until cancelled."""
        await repeat("a round of health checks", self.round, PERIOD_S)

    def context_tokens(self, uid: str) -> int | None:
        """The longest prompt and answer together that the pod can hold, once it has said so."""
        return self._context_tokens.get(uid) or None

    async def round(self) -> None:
        await asyncio.gather(*(self._ask(pod) for pod in self._discovery.pods if pod.ready))
        now_s = self._clock()
        # As they are now: a pod that came while the others were asked may run streams already.
        uids = {pod.uid for pod in self._discovery.pods}
        for gone in self._heard_s.keys() - uids:
            del self._heard_s[gone]
            self._context_tokens.pop(gone, None)
        self._unanswered &= uids
        silent = {uid for uid in self._unanswered if now_s - self._last_s(uid) > SILENCE_S}
        for uid in (silent | (self._client.live_uids - uids)) & self._client.live_uids:
            log.warning("pod %s is gone or silent: its streams move", uid)
            self._client.cut(uid)
        self._draining &= uids
        self.unusable = frozenset(silent | self._draining)
        self._loads.keep(uids)

    def _last_s(self, uid: str) -> float:
        return max(self._heard_s[uid], self._client.heard_s(uid))

    async def _ask(self, pod: PodView) -> None:
        self._heard_s.setdefault(pod.uid, self._clock())
        ours = self._loads.streams(pod.uid)
        try:
            state = await self._client.state(pod)
        except PodUnreachable as error:
            log.debug("%s", error)
            self._unanswered.add(pod.uid)
            return
        self._unanswered.discard(pod.uid)
        self._heard_s[pod.uid] = self._clock()
        self._loads.observe(pod.uid, state.in_flight, ours)
        self._context_tokens[pod.uid] = state.context_tokens
        if state.draining:
            self._draining.add(pod.uid)
        else:
            self._draining.discard(pod.uid)
