"""One stream's way out of the prefill pod: computed, read page by page, sent as it is granted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.grammar import Grammar, Grammars
from tandem_runtime.engine.sequence import (
    NotFinite,
    Request,
    RequestRefused,
    SampledToken,
    StreamOutput,
)
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import Connection
from tandem_runtime.kv.handoff.counters import Counters
from tandem_runtime.kv.handoff.engine_thread import EngineThread
from tandem_runtime.kv.handoff.pages import checksum
from tandem_runtime.kv.handoff.reader import Page, PageReader
from tandem_runtime.kv.wire import StreamKey
from tandem_runtime.prefix import compact
from tandem_runtime.protocol import GenerateRequest

T = TypeVar("T")


@dataclass(frozen=True)
class PageSource:
    """Where the pages of all streams come from."""

    engine: EngineThread
    reader: PageReader
    grammars: Grammars
    ahead_tokens: int
    """How far pages of a stream are read out ahead of what was sent."""
    counters: Counters


class Export:
    """One attempt of a stream: `transfer()` is the protocol, `release()` gives the blocks back."""

    task: asyncio.Task[None]

    def __init__(
        self,
        key: StreamKey,
        request: GenerateRequest,
        connection: Connection,
        source: PageSource,
        arrived_s: float,
    ) -> None:
        self.key = key
        self.counters = source.counters
        self.given_up = "ended_early"
        """What it counts as when its task is cancelled."""
        self._connection = connection
        self._source = source
        self._request = request
        self._prompt_ids = compact(request.prompt_ids)
        self._known_tokens = len(request.prompt_ids) + len(request.output_ids)
        self._arrived_s = arrived_s
        self._changed = asyncio.Event()
        self._first_output: tuple[StreamOutput, float] | None = None
        self._token: SampledToken | None = None
        self._aborted = False
        """The engine has ended the stream without a token, and taken its blocks back."""
        self._pages: deque[Page] = deque()
        self._next_token = 0
        """Where the next page read must begin; others are of a reading given up."""
        self._grant: wire.Grant | None = None
        self._acknowledged = False

    @property
    def begun(self) -> bool:
        return self._first_output is not None

    @property
    def computed(self) -> bool:
        return self._token is not None

    async def transfer(self) -> None:
        """The protocol, from admission to acknowledgement.

        Raises:
            RequestRefused: the engine can never serve it.
            NotFinite: the model gives no token.
            ConnectionLost: nobody is left to send to.
        """
        send = self._connection.send
        engine = self._source.engine
        engine.route(str(self.key), self._take_output)
        grammar = await self._source.grammars.follow(self._request.sampling.grammar)
        await engine.call(partial(self._admit, grammar))
        output, began_s = await self._until(lambda: self._first_output)
        queue_s = max(0.0, began_s - self._arrived_s)
        await send(wire.Offer(*self.key, self._known_tokens, output.cached_tokens, queue_s))
        grant = await self._until(lambda: self._grant)
        sent = grant.have_tokens
        while sent < self._known_tokens:
            page = await self._until(self._page_due)
            self._pages.popleft()
            frame = wire.Pages(
                *self.key,
                page.span.start,
                page.span.end - page.span.start,
                checksum(page.payload),
            )
            await send(frame, page.payload)
            self.counters.bytes += page.payload.nbytes
            sent = page.span.end
            self._read_on(sent + self._source.ahead_tokens)
        token = await self._until(lambda: self._token)
        await send(wire.First(*self.key, token.token_id, token.logprob, token.top_logprobs))
        await self._until(lambda: self._acknowledged or None)

    def take(self, frame: wire.Grant | wire.Ack) -> None:
        """A frame of the decode pod."""
        if isinstance(frame, wire.Ack):
            self._acknowledged = True
        elif self._grant is None:
            self._grant = frame
            if frame.have_tokens:
                self._reread_from(frame.have_tokens)
        elif frame.upto_tokens > self._grant.upto_tokens:
            self._grant = msgspec.structs.replace(self._grant, upto_tokens=frame.upto_tokens)
        self._changed.set()

    def release(self) -> None:
        """Gives the blocks back; the engine may not know the stream (yet, or any more)."""
        engine, reader, request_id = self._source.engine, self._source.reader, str(self.key)
        engine.unroute(request_id)

        def end(running: Engine) -> None:
            reader.end(request_id)
            running.release(request_id)

        engine.call(end)

    def _admit(self, grammar: Grammar | None, engine: Engine) -> None:
        request = self._request
        ended = engine.add(
            Request(
                request_id=str(self.key),
                prompt_ids=self._prompt_ids,
                sampling=request.sampling,
                output_ids=request.output_ids,
                tenant=request.tenant,
                cache_salt=request.cache_salt,
                holder=request.holder,
                begins=request.begins,
                grammar=grammar,
                export=True,
            )
        )
        if ended is not None:
            raise RequestRefused(f"stream {self.key} has ended already: {ended}")
        ahead = self._source.ahead_tokens
        self._source.reader.begin(str(self.key), self._known_tokens, ahead, self._take_pages)

    def _take_output(self, output: StreamOutput, began_s: float) -> None:
        if self._first_output is None:
            self._first_output = output, began_s
        self._token = output.token
        self._aborted = output.token is None and output.finish_reason is not None
        self._changed.set()

    def _take_pages(self, pages: list[Page]) -> None:
        for page in pages:
            if page.span.start == self._next_token:
                self._next_token = page.span.end
                self._pages.append(page)
        self._changed.set()

    def _page_due(self) -> Page | None:
        assert self._grant is not None
        if self._pages and self._pages[0].span.end <= self._grant.upto_tokens:
            return self._pages[0]
        return None

    def _read_on(self, upto_tokens: int) -> None:
        reader, request_id = self._source.reader, str(self.key)
        self._source.engine.call(lambda engine: reader.allow(engine, request_id, upto_tokens))

    def _reread_from(self, token: int) -> None:
        self._pages.clear()
        self._next_token = token
        reader, request_id = self._source.reader, str(self.key)
        self._source.engine.call(lambda engine: reader.restart(engine, request_id, token))

    async def _until(self, value: Callable[[], T | None]) -> T:
        """The first value that is not None. Raises `NotFinite` as soon as none can follow."""
        while not self._aborted:
            result = value()
            if result is not None:
                return result
            self._changed.clear()
            await self._changed.wait()
        raise NotFinite
