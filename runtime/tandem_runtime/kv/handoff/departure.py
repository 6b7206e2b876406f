"""A running stream's way to another pod: KV is sent while it is decoded, then it stands still.

The stream stays this pod's until the other one acknowledges. Whatever fails before (the other pod,
the connection, a lease), the stream goes on here as if nothing had been.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import SampledToken, Span
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import Connection
from tandem_runtime.kv.handoff.counters import Counters
from tandem_runtime.kv.handoff.engine_thread import EngineThread
from tandem_runtime.kv.handoff.pages import checksum
from tandem_runtime.kv.handoff.reader import Page
from tandem_runtime.kv.wire import StreamKey

_VISIT_BYTES: Final = 16 << 20
"""KV read between two steps (at least a page): the streams that stay wait for it."""
_FEW_TOKENS: Final = 16
"""A stream stands still once no more than so many computed tokens are left to send."""
_MARGIN_TOKENS: Final = 64
"""Tokens that may still come between the decision to freeze and the freeze."""
_ACK_S: Final = 3.0
"""How long a stream stands still for the other pod, before it goes on here."""


class CannotMove(Exception):
    """The stream stays here, or has ended; the message says why."""


class Running(Protocol):
    """A stream that is decoded here, as whoever serves it knows it. On the event loop."""

    @property
    def request_id(self) -> str:
        """Its name in the engine."""

    @property
    def known_tokens(self) -> int:
        """Prompt and output, as far as it was delivered."""

    def tokens_from(self, position: int) -> Sequence[SampledToken]:
        """Known tokens from this position on."""

    def moved(self, pod: str) -> None:
        """It goes on on that pod, and ends here."""


@dataclass(frozen=True)
class Departures:
    """What all departures of a pod share."""

    engine: EngineThread
    page_tokens: int
    page_bytes: int
    counters: Counters
    on_moved: Callable[[float], None]
    """Told how long a stream that moved stood still, in seconds."""

    @property
    def visit_tokens(self) -> int:
        return max(1, _VISIT_BYTES // self.page_bytes) * self.page_tokens


@dataclass(frozen=True)
class _Visit:
    """What was read between two steps."""

    pages: list[Page]
    computed_tokens: int


class Departure:
    """One move: `transfer()` is the protocol, `release()` lets the stream go on if it stays."""

    task: asyncio.Task[None]

    def __init__(
        self,
        take: wire.Take,
        stream: Running,
        connection: Connection,
        shared: Departures,
        to_pod: str,
    ) -> None:
        self.key: StreamKey = take.key
        self.given_up = "ended_early"
        """What it counts as when its task is cancelled."""
        self.counters = shared.counters
        self._take_frame = take
        self._stream = stream
        self._connection = connection
        self._shared = shared
        self._to_pod = to_pod
        self._upto_tokens = take.upto_tokens
        self._told_tokens = take.known_tokens
        self._frozen_s: float | None = None
        """When it began to stand still, once all of it was sent."""
        self._acknowledged = False
        self._changed = asyncio.Event()

    async def transfer(self) -> None:
        """The protocol, up to the acknowledgement.

        Raises:
            CannotMove: it has ended, or stays here.
            ConnectionLost: nobody is left to send to.
        """
        if self._stream.known_tokens < self._told_tokens:
            raise CannotMove("the other pod knows more of the stream than this one")
        sent, freeze, began_s = self._take_frame.have_tokens, False, 0.0
        while True:
            if freeze and not began_s:
                began_s = time.monotonic()
            visit = await self._visit(sent, freeze)
            await self._tell(visit.pages)
            sent = visit.pages[-1].span.end if visit.pages else sent
            left = visit.computed_tokens - sent
            if freeze and left <= 0:
                break
            limit = self._take_frame.limit_tokens - _MARGIN_TOKENS
            freeze = freeze or left <= _FEW_TOKENS or self._stream.known_tokens >= limit
            while left > 0 and sent >= self._upto_tokens:
                await self._change()
        self._frozen_s = began_s
        await self._connection.send(wire.Frozen(*self.key))
        try:
            async with asyncio.timeout(_ACK_S):
                while not self._acknowledged:
                    await self._change()
        except TimeoutError:
            told = f"pod {self._to_pod} did not take the stream within {_ACK_S:g} s"
            raise CannotMove(told) from None

    def take(self, frame: wire.Grant | wire.Ack) -> None:
        """A frame of the other pod."""
        if isinstance(frame, wire.Grant):
            self._upto_tokens = max(self._upto_tokens, frame.upto_tokens)
        elif self._frozen_s is not None and not self._acknowledged:
            # At once, whatever becomes of the task: from now on the stream is the other pod's.
            self._acknowledged = True
            self._stream.moved(self._to_pod)
            self._shared.on_moved(time.monotonic() - self._frozen_s)
        self._changed.set()

    def release(self) -> None:
        """The engine may not know the stream any more."""
        request_id = self._stream.request_id
        if self._acknowledged:
            self._shared.engine.call(lambda engine: engine.abort(request_id))
        else:
            self._shared.engine.call(lambda engine: engine.thaw(request_id))

    async def _visit(self, sent: int, freeze: bool) -> _Visit:
        try:
            return await self._shared.engine.until(partial(self._read, sent, freeze))
        except KeyError:
            raise CannotMove("the stream has ended meanwhile") from None
        except ValueError as error:
            raise CannotMove(str(error)) from None

    def _read(self, sent: int, freeze: bool, engine: Engine) -> _Visit | None:
        """In the engine's thread; None while a step that computes the stream is in flight."""
        request_id = self._stream.request_id
        if freeze and not engine.freeze(request_id):
            return None
        computed = engine.computed_tokens(request_id)
        end = min(computed, self._upto_tokens, sent + self._shared.visit_tokens)
        pages = []
        for start in range(sent, end, self._shared.page_tokens):
            span = Span(start, min(start + self._shared.page_tokens, end))
            payload = engine.read_kv(request_id, span.start, span.end)
            pages.append(Page(span, memoryview(payload).cast("B")))
        return _Visit(pages, computed)

    async def _tell(self, pages: list[Page]) -> None:
        """What was chosen since, then the pages: the outputs of the steps that computed them have
        been delivered before the visit's result was."""
        news = self._stream.tokens_from(self._told_tokens)
        if news:
            tokens = tuple(wire.Token(t.token_id, t.logprob, t.top_logprobs) for t in news)
            self._told_tokens += len(tokens)
            await self._connection.send(wire.News(*self.key, tokens))
        for page in pages:
            first, tokens_sent = page.span.start, page.span.end - page.span.start
            frame = wire.Pages(*self.key, first, tokens_sent, checksum(page.payload))
            await self._connection.send(frame, page.payload)
            self.counters.bytes += page.payload.nbytes

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
