"""The namespace's named contexts, as one gateway knows and repairs them.

Nobody is in charge: contexts live on the pods that keep them, and every gateway remembers all that
it has seen on any pod. So a gateway that starts learns them from pods, and a pod that starts, or
replaces another, gets them from gateways (docs/design/contexts.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import msgspec

from tandem_runtime.frontend.contexts import (
    Book,
    ContextView,
    Owner,
    deleted,
    without_content,
)
from tandem_runtime.frontend.errors import ApiError, BadRequest, ContextNotFound, Unavailable
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.gateway import placement
from tandem_runtime.gateway.context_meter import ContextMeter
from tandem_runtime.gateway.context_sources import Sources
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.fleets import RETRY_AFTER_S
from tandem_runtime.gateway.health import PodHealth
from tandem_runtime.gateway.loops import repeat
from tandem_runtime.gateway.pod_client import PodClient, PodRefused, PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.protocol import Context, ContextCopy, ContextState, ContextStates

log = logging.getLogger(__name__)

PERIOD_S: Final = 2.0
_LEAST_S: Final = 0.1
"""Between two rounds, however many ask for what does not exist."""


class GatewayContexts:
    """Implements `frontend.backend.Contexts`."""

    def __init__(
        self,
        discovery: Discovery,
        client: PodClient,
        health: PodHealth,
        meter: ContextMeter,
        book: Book | None = None,
    ) -> None:
        self._discovery = discovery
        self._client = client
        self._health = health
        self._meter = meter
        self._book = book or Book()
        self._copies: dict[str, dict[str, ContextCopy]] = {}
        """By uid of a pod, as of the last round; those that it was sent since."""
        self._sources = Sources(client, self._book.take)
        self._refused: dict[str, str] = {}
        """By context: what a pod said that does not keep it as it asks."""
        self._round = asyncio.Lock()
        self._complete = True
        """Whether every pod answered in the last round."""
        self._rounds = 0
        """That have begun."""
        self._asked = 0
        """How often somebody waited for one."""
        self._begun_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        await repeat("a round over contexts", self.refresh, PERIOD_S)

    # -- frontend.backend.Contexts ----------------------------------------------------------------
    async def create(self, context: Context) -> ContextView:
        self._book.check_room(context)
        pods = placement.keepers(context, self._pods, self._copies)
        if not pods:
            raise Unavailable(
                f"No pod of fleet '{context.fleet}' can keep a context now; try again shortly.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._book.take(context)
        outcomes = await asyncio.gather(*(self._send(pod, context) for pod in pods))
        if failures := [outcome for outcome in outcomes if outcome is not None]:
            refused = [f for f in failures if isinstance(f, BadRequest)]
            if refused or len(failures) == len(pods):
                await self.change(deleted(context, time.time()))
                raise (refused or failures)[0]
        return self._view(context)

    async def find(self, id_: str, owner: Owner) -> ContextView:
        # Whatever the reason is why there is none to be had, the same happens and takes as long.
        context = self._book.find(id_, owner)
        if context is None:
            await self._ask_pods()
            context = self._book.find(id_, owner)
        if context is None and not self._complete:
            raise Unavailable("Some pods do not say now which contexts they keep; ask again.")
        if context is None:
            raise ContextNotFound(id_)
        return self._view(context)

    async def owned(self, owner: Owner) -> list[ContextView]:
        await self._ask_pods()
        return [self._view(c) for c in self._book.live() if Owner.of(c) == owner]

    async def change(self, context: Context) -> ContextView:
        self._book.take(context)
        holders = [pod for pod in self._pods if context.id in self._copies.get(pod.uid, {})]
        await asyncio.gather(*(self._send(pod, context) for pod in holders))
        return self._view(context)

    # -- for streams ------------------------------------------------------------------------------
    def held_tokens(self, context_id: str) -> dict[str, int]:
        """By uid: pods that keep the context, and how many tokens that is."""
        found = {uid: copies.get(context_id) for uid, copies in self._copies.items()}
        return {uid: c.tokens for uid, c in found.items() if c is not None and c.state == "ready"}

    def observe(self, record: StreamRecord) -> None:
        """Told of each stream when it ended."""
        context = self._book.get(record.context) if record.context else None
        if context is not None:
            self._meter.observe(record, self._view(context))

    # -- for the operator -------------------------------------------------------------------------
    async def put(self, context: Context) -> ContextState:
        """Keep it, or this version of it; a round sends it to pods. Raises `Unavailable`."""
        known = self._book.get(context.id)
        if known is None and not context.deleted:
            self._book.check_room(context)
        if context.uri and not context.deleted:
            if known is None or known.created_unix_s != context.created_unix_s:
                self._sources.add(context)
                self._sources.look(self._pods)
                return self._state(context)
            # The same content, read already: its new version has it, too.
            content = {"prompt": known.prompt, "messages": known.messages}
            context = msgspec.structs.replace(context, **content)
        else:
            self._sources.drop(context.id)
        if self._book.take(context):
            await self.refresh()
        return self._state(context)

    @property
    def states(self) -> ContextStates:
        """Of all that have not expired; the deleted ones, too."""
        return ContextStates(tuple(self._state(context) for context in self._book.all()))

    def state(self, id_: str) -> ContextState | None:
        """Of one of them; None: it is not known."""
        context = self._sources.awaited.get(id_) or self._book.get(id_)
        return None if context is None else self._state(context)

    def _state(self, context: Context) -> ContextState:
        names = {pod.uid: pod.name for pod in self._discovery.pods}
        held = {
            names[uid]: copies[context.id]
            for uid, copies in self._copies.items()
            if context.id in copies and uid in names
        }
        counted = self._meter.of(context)
        reason = self._sources.reasons.get(context.id) or self._refused.get(context.id, "")
        return ContextState(without_content(context), held, *counted, reason)

    # -- rounds -----------------------------------------------------------------------------------
    async def refresh(self) -> None:
        """Ask every pod what it keeps, take in what is new, and send what is missing."""
        async with self._round:
            await self._refresh()

    async def _ask_pods(self) -> None:
        """Until a round has ended that began after the call; all who wait share it."""
        self._asked += 1
        before = self._rounds
        async with self._round:
            if self._rounds == before:
                await asyncio.sleep(max(0.0, self._begun_s + _LEAST_S - time.monotonic()))
                await self._refresh()

    async def _refresh(self) -> None:
        self._rounds += 1
        self._begun_s = time.monotonic()
        pods = self._pods
        answers = await asyncio.gather(*(self._listed(pod) for pod in pods))
        uids = {pod.uid for pod in self._discovery.pods}
        self._copies = {uid: had for uid, had in self._copies.items() if uid in uids}
        self._complete = None not in answers
        for pod, answer in zip(pods, answers, strict=True):
            if answer is not None:
                self._copies[pod.uid] = answer
                for copy in answer.values():
                    await self._learn(pod, copy)
        for gone in self._book.prune():
            self._meter.forget(gone.id)
            self._refused.pop(gone.id, None)
        self._sources.look(pods)
        missing = placement.repairs(self._book.all(), pods, self._copies)
        await asyncio.gather(*(self._send(pod, context) for pod, context in missing))

    @property
    def _pods(self) -> list[PodView]:
        usable = (pod for pod in self._discovery.pods if pod.ready)
        return [pod for pod in usable if pod.uid not in self._health.unusable]

    async def _listed(self, pod: PodView) -> dict[str, ContextCopy] | None:
        try:
            copies = (await self._client.contexts(pod)).copies
        except PodUnreachable as error:
            log.debug("%s", error)
            return None
        return {copy.id: copy for copy in copies}

    async def _learn(self, pod: PodView, copy: ContextCopy) -> None:
        known = self._book.get(copy.id)
        have = (0.0, 0) if known is None else (known.created_unix_s, known.version)
        if have >= (copy.created_unix_s, copy.version):
            return
        try:
            self._book.take(await self._client.context(pod, copy.id))
        except PodUnreachable as error:
            log.warning("the context %s is not known yet: %s", copy.id, error)
            self._complete = False

    async def _send(self, pod: PodView, context: Context) -> ApiError | None:
        """Why the pod does not keep it, if so."""
        try:
            copy = await self._client.keep(pod, context)
        except PodRefused as refused:
            log.warning("pod %s refuses the context %s: %s", pod.name, context.id, refused)
            self._refused[context.id] = str(refused)
            return BadRequest(str(refused))
        except PodUnreachable as error:
            log.warning("the context %s does not reach its pod: %s", context.id, error)
            return Unavailable(f"The context could not be kept: {error}.")
        self._refused.pop(context.id, None)
        self._copies.setdefault(pod.uid, {})[context.id] = copy
        return None

    def _view(self, context: Context) -> ContextView:
        uids = {pod.uid for pod in self._discovery.pods}
        held = (copies.get(context.id) for uid, copies in self._copies.items() if uid in uids)
        return ContextView(context, tuple(copy for copy in held if copy is not None))
