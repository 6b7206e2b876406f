"""A running stream's way to another pod: KV is sent while it is decoded, then it stands still.

The stream stays this pod's until the other one acknowledges. Whatever fails before (the other pod,
the connection, a lease), the stream goes on here as if nothing had been.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

_VISIT_BYTES: Final = 4 << 20
"""KV read between two steps (a few tokens to a page): the streams that stay wait for it."""
_VISIT_TOKENS: Final = 16
"""At least, however large their KV is."""
_AHEAD_VISITS: Final = 2
"""What may be on its way, not yet stored by the other pod: it too has streams that wait."""
_FEW_TOKENS: Final = 16
"""A stream stands still once the other pod has stored all computed tokens but so many."""
_REPORT_S: Final = 10.0
"""How long the other pod may say nothing of what it stored, before the stream stays."""
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
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One stream at a time: the last frames of one never wait behind the pages of another."""

    @property
    def visit_tokens(self) -> int:
        token_bytes = self.page_bytes // self.page_tokens
        return min(max(_VISIT_TOKENS, _VISIT_BYTES // token_bytes), self.page_tokens)


@dataclass(frozen=True)
class _Visit:
    """What was read between two steps."""

    page: Page | None
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
        self._stored_tokens = take.have_tokens
        """In the other pod's cache, as far as it has said."""
        self._told_tokens = take.known_tokens
        self._frozen_s: float | None = None
        """When it began to stand still, once all of it was sent."""
        self._acknowledged = False
        self._changed = asyncio.Event()

    async def transfer(self) -> None:
        """The protocol, up to the acknowledgement, when it is this stream's turn.

        Raises:
            CannotMove: it has ended, or stays here.
            ConnectionLost: nobody is left to send to.
        """
        async with self._shared.turn:
            if self._stream.known_tokens < self._told_tokens:
                raise CannotMove("the other pod knows more of the stream than this one")
            if self._outran:
                raise CannotMove("the stream grew too long while others moved")
            self._frozen_s = await self._send_all()
            await self._connection.send(wire.Frozen(*self.key))
            while not self._acknowledged:
                await self._change(_ACK_S, "did not take the stream")

    async def _send_all(self) -> float:
        """Sends it while it is decoded, then the rest; when it began to stand still."""
        sent, freeze, began_s = self._take_frame.have_tokens, False, 0.0
        while True:
            if freeze and not began_s:
                began_s = time.monotonic()
            visit = await self._visit(sent, freeze)
            await self._tell(visit.page)
            sent = sent if visit.page is None else visit.page.span.end
            left = visit.computed_tokens - sent
            if freeze and left <= 0:
                return began_s
            few = visit.computed_tokens - self._stored_tokens <= _FEW_TOKENS
            freeze = freeze or few or self._outran
            while self._must_wait(sent, left, freeze):
                await self._change(_ACK_S if freeze else _REPORT_S, "stored nothing more")

    def _must_wait(self, sent: int, left: int, freeze: bool) -> bool:
        """Whether the other pod has to store, or to grant, before more is read."""
        if left > 0 and sent >= self._upto_tokens:
            return True
        ahead = _AHEAD_VISITS * self._shared.visit_tokens if left > 0 else 1
        return not freeze and sent - self._stored_tokens >= ahead

    @property
    def _outran(self) -> bool:
        """Little is left of the room that the other pod has for it."""
        return self._stream.known_tokens >= self._take_frame.limit_tokens - _MARGIN_TOKENS

    def take(self, frame: wire.Grant | wire.Ack) -> None:
        """A frame of the other pod."""
        if isinstance(frame, wire.Grant):
            self._upto_tokens = max(self._upto_tokens, frame.upto_tokens)
            self._stored_tokens = max(self._stored_tokens, frame.have_tokens)
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
        # The rest at once, for now the stream waits, too.
        most = self._shared.page_tokens if freeze else self._shared.visit_tokens
        end = min(computed, self._upto_tokens, sent + most)
        if end <= sent:
            return _Visit(None, computed)
        payload = engine.read_kv(request_id, sent, end)
        return _Visit(Page(Span(sent, end), memoryview(payload).cast("B")), computed)

    async def _tell(self, page: Page | None) -> None:
        """What was chosen since, then the page: the outputs of the steps that computed it have
        been delivered before the visit's result was."""
        news = self._stream.tokens_from(self._told_tokens)
        if news:
            tokens = tuple(wire.Token(t.token_id, t.logprob, t.top_logprobs) for t in news)
            self._told_tokens += len(tokens)
            await self._connection.send(wire.News(*self.key, tokens))
        if page is not None:
            first, tokens_sent = page.span.start, page.span.end - page.span.start
            frame = wire.Pages(*self.key, first, tokens_sent, checksum(page.payload))
            await self._connection.send(frame, page.payload)
            self.counters.bytes += page.payload.nbytes

    async def _change(self, within_s: float, failing: str) -> None:
        """Until the other pod says something."""
        self._changed.clear()
        try:
            async with asyncio.timeout(within_s):
                await self._changed.wait()
        except TimeoutError:
            told = f"pod {self._to_pod} {failing} within {within_s:g} s"
            raise CannotMove(told) from None
