"""A stream's events from the pod that has it, and its move to another one while it runs.

The journal follows one attempt. While its pod drains, a second attempt asks another pod to take the
stream over; its first event says that it has, and carries every token that the first pod chose. The
journal goes on with what it has not seen of them: whichever pod's events come first, and whatever
fails in between, no token is lost or taken twice (docs/design/migration.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from tandem_runtime.gateway.attempt import Attempt
from tandem_runtime.gateway.journal import Journal
from tandem_runtime.gateway.moves import Moves
from tandem_runtime.gateway.pod_client import PodUnreachable
from tandem_runtime.protocol import GenerateEvent

log = logging.getLogger(__name__)

_AGAIN_S: Final = 1.0
"""After a move that failed, or when no pod could take the stream."""
_ANSWER_S: Final = 5.0
"""How long the other pod's answer is awaited when the first pod's events have ended."""


class Observer(Protocol):
    """Of moves, for the metrics."""

    def migration_ended(self, outcome: str) -> None:
        """`moved`, `failed`, `cancelled` (the pod stays) or `ended` (the stream did, first)."""

    def migration_paused(self, pause_s: float) -> None:
        """From the first pod's last token to the second one's first."""


BeginMove = Callable[[Attempt, frozenset[str]], Attempt | None]
"""The attempt that takes over from another one, on none of the pods with these uids."""


class Relay:
    def __init__(
        self,
        attempt: Attempt,
        journal: Journal,
        moves: Moves,
        begin: BeginMove,
        observer: Observer,
    ) -> None:
        self.current = attempt
        """Whose events count."""
        self._journal = journal
        self._moves = moves
        self._begin = begin
        self._observer = observer
        self._taker: Attempt | None = None
        self._tried: set[str] = set()
        """Uids of pods that did not take the stream."""
        self._not_before_s = 0.0
        self._flows = False
        """Whether the current attempt has brought a token."""
        self._last_token_s = 0.0
        self._moved = False
        """Whether the second pod's first own token is still to come."""

    async def next(self) -> GenerateEvent:
        """The stream's next event, taken by the journal, or an error event of its attempt.

        Raises `PodUnreachable` for the current attempt.
        """
        while True:
            await self._consider()
            event = await self._event() if self._taker is None else await self._either(self._taker)
            if event is None:
                continue
            if event.error is not None or self._journal.take(event):
                self._note(event)
                return event

    async def close(self) -> None:
        if self._taker is not None:
            await self._give_up(self._taker, "ended")
        await self.current.close()

    async def _event(self) -> GenerateEvent:
        return await self.current.next()

    async def _consider(self) -> None:
        """Begins a move that is due, and ends one that is not any more."""
        uid = self.current.pair.decode.uid
        if not self._moves.due(uid):
            if self._taker is not None:
                await self._give_up(self._taker, "cancelled")
            return
        now_s = time.monotonic()
        if self._taker is not None or not self._flows or now_s < self._not_before_s:
            return
        if self._moves.begin(uid):
            self._taker = self._begin(self.current, frozenset(self._tried))
            if self._taker is None:
                self._tried.clear()
                self._not_before_s = now_s + _AGAIN_S
                self._moves.end(uid)

    async def _either(self, taker: Attempt) -> GenerateEvent | None:
        """The first event of the two attempts; None for one that says nothing to the client."""
        both = {self.current.ahead(), taker.ahead()}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if taker.ahead().done():
            return await self._answer(taker)
        try:
            event = await self._event()
        except PodUnreachable:
            fresh = await self._last_word(taker)
            if self.current is not taker:
                raise
            return fresh
        if event.error is None:
            return event
        fresh = await self._last_word(taker)
        return fresh if self.current is taker else event

    async def _last_word(self, taker: Attempt) -> GenerateEvent | None:
        """The first pod's events have ended: the second one may have the stream, or say so soon."""
        done, _ = await asyncio.wait({taker.ahead()}, timeout=_ANSWER_S)
        if done:
            return await self._answer(taker)
        await self._failed(taker, f"no answer within {_ANSWER_S:g} s")
        return None

    async def _answer(self, taker: Attempt) -> GenerateEvent | None:
        """The second pod's first event: it has the stream, or the first one keeps it."""
        try:
            event = await taker.next()
        except PodUnreachable as error:
            self._journal.avoid.add(taker.pair.decode.uid)
            await self._failed(taker, str(error))
            return None
        fresh = self._journal.switch(taker.ask, event) if event.taken_over else None
        if fresh is None:
            await self._failed(taker, event.error or "the stream went on where it was")
            return None
        log.info("stream %s moved to pod %s", taker.ask.stream_id, taker.pair.decode.name)
        self._observer.migration_ended("moved")
        self._moves.end(self.current.pair.decode.uid)
        await self.current.close()
        self.current, self._taker = taker, None
        self._flows, self._moved = False, True
        return fresh if fresh.token_ids else None

    async def _failed(self, taker: Attempt, reason: str) -> None:
        name = taker.pair.decode.name
        log.warning("stream %s did not move to pod %s: %s", taker.ask.stream_id, name, reason)
        await self._give_up(taker, "failed")

    async def _give_up(self, taker: Attempt, outcome: str) -> None:
        self._observer.migration_ended(outcome)
        self._tried.add(taker.pair.decode.uid)
        self._not_before_s = time.monotonic() + _AGAIN_S
        self._moves.end(self.current.pair.decode.uid)
        self._taker = None
        await taker.close()

    def _note(self, event: GenerateEvent) -> None:
        if not event.token_ids:
            return
        now_s = time.monotonic()
        if self._moved and event.epoch == self.current.ask.epoch and not event.taken_over:
            self._moved = False
            self._observer.migration_paused(now_s - self._last_token_s)
        self._flows = True
        self._last_token_s = now_s
        self.current.prefilled()
