"""The receiving end of the handoff: asks for KV, stores it, starts decoding.

`receive` is for a prompt that a prefill pod computes, `take_over` for a stream that another pod
decodes. Both read like the protocol and run in the task of whoever wants the stream: when that task
is cancelled, or anything fails, blocks are given back here and the other pod is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import msgspec

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import (
    FinishReason,
    Grant,
    Request,
    RequestRefused,
    SampledToken,
    StreamOutput,
)
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.counters import Counters
from tandem_runtime.kv.handoff.engine_thread import EngineThread
from tandem_runtime.kv.handoff.handshake import Identity
from tandem_runtime.kv.handoff.lease import Timing
from tandem_runtime.kv.handoff.link import (
    Arrived,
    HandoffFailed,
    Inbox,
    InboxFrame,
    Link,
    Links,
    NoRoom,
    PeerAborted,
)
from tandem_runtime.kv.handoff.pages import checksum, credit
from tandem_runtime.kv.wire import StreamKey
from tandem_runtime.protocol import GenerateRequest, Handoff, PrefillTarget

log = logging.getLogger(__name__)

_WINDOW_BYTES: Final = 64 << 20
"""KV of one stream that may be on its way (at least two pages)."""
_HEADROOM_TOKENS: Final = 1024
"""That a stream may grow by while it moves."""


@dataclass(frozen=True)
class Imported:
    """A stream whose KV is here."""

    first: StreamOutput
    """The engine's output for the token that the prefill pod sampled."""
    cached_tokens: int
    """Of the prompt, in the prefill pod's prefix cache."""
    queue_s: float
    handoff: Handoff


@dataclass(frozen=True)
class TakenOver:
    """A stream that was decoded elsewhere and runs here now."""

    tokens: tuple[wire.Token, ...]
    """What the other pod had generated beyond the output of the request."""
    bytes: int


class Importer:
    def __init__(
        self,
        engine: EngineThread,
        identity: Identity,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_handoff: Callable[[Handoff], None] = lambda handoff: None,
    ) -> None:
        self._engine = engine
        self._timing = timing or Timing()
        self._page_tokens = identity.layout.page_tokens
        self._page_bytes = identity.page_bytes
        self._links = Links(identity, self._timing, clock)
        self._on_handoff = on_handoff
        self.counters = Counters()
        self.takeovers = Counters()

    @property
    def late_pages(self) -> int:
        """Pages of streams that had ended here; they were dropped."""
        return self._links.late_pages

    async def close(self) -> None:
        await self._links.close()

    async def receive(self, request: Request, ask: GenerateRequest) -> Imported | FinishReason:
        """Brings the KV of `ask` here and starts `request` in the engine.

        Returns:
            The running stream, or the reason why its earlier output already ends it.

        Raises:
            HandoffFailed: the attempt failed.
            RequestRefused: the engine can never serve it.
            In either case, and when cancelled, nothing of the stream is left here.
        """
        try:
            imported = await self._receive(request, ask)
        except BaseException as failure:
            self.counters.fail(_reason(failure))
            raise
        if isinstance(imported, Imported):
            self._count(imported.handoff)
        return imported

    async def _receive(self, request: Request, ask: GenerateRequest) -> Imported | FinishReason:
        assert ask.prefill is not None
        key = StreamKey(ask.stream_id, ask.epoch)
        async with self._attempt(ask.prefill, key, request.request_id) as (link, inbox):
            # The prefill pod is asked meanwhile: the engine answers between two steps.
            expected = self._engine.call(lambda engine: engine.expect(request))
            link.post(wire.Request(msgspec.structs.replace(ask, prefill=None)))
            ended = await expected
            if ended is not None:
                link.post(wire.Abort(*key, "ended", f"the stream has ended: {ended}"))
                return ended
            imported = await self._import(link, inbox, key, request.request_id, ask.prefill.pod)
        link.post(wire.Ack(*key))
        return imported

    @asynccontextmanager
    async def _attempt(
        self, target: PrefillTarget, key: StreamKey, request_id: str
    ) -> AsyncIterator[tuple[Link, Inbox]]:
        """A stream's connection to the other pod; after a failure nothing of it is left."""
        link = await self._links.to(target)
        inbox = link.begin(key)
        try:
            yield link, inbox
        except BaseException as failure:
            self._engine.call(lambda engine: engine.abort(request_id))
            if not isinstance(failure, PeerAborted):
                link.post(wire.Abort(*key, "ended", "the receiving pod ended the stream"))
            raise
        finally:
            link.end(key)

    async def take_over(self, request: Request, ask: GenerateRequest) -> TakenOver:
        """Goes on here with a stream that another pod decodes; it gives it up once all is here.

        Raises as `receive`; then, and when cancelled, the stream goes on where it was.
        """
        try:
            taken = await self._take_over(request, ask)
        except BaseException as failure:
            self.takeovers.fail(_reason(failure))
            raise
        self.takeovers.streams += 1
        self.takeovers.bytes += taken.bytes
        return taken

    async def _take_over(self, request: Request, ask: GenerateRequest) -> TakenOver:
        assert ask.take_from is not None
        key, request_id = StreamKey(ask.stream_id, ask.epoch), request.request_id
        known_tokens = len(ask.prompt_ids) + len(ask.output_ids)
        left_tokens = ask.sampling.max_tokens - len(ask.output_ids)
        room_tokens = known_tokens + min(left_tokens, _HEADROOM_TOKENS)
        limit_tokens = known_tokens + _HEADROOM_TOKENS
        async with self._attempt(ask.take_from, key, request_id) as (link, inbox):
            expect = partial(Engine.expect, request=request, headroom_tokens=_HEADROOM_TOKENS)
            if await self._engine.call(expect) is not None:
                raise HandoffFailed("not_moved", "the stream has ended")
            grant = await self._first_grant(request_id, room_tokens)
            have, inbox.granted_tokens = grant.have_tokens, grant.granted_tokens
            link.post(wire.Take(*key, known_tokens, limit_tokens, have, grant.granted_tokens))
            tokens: list[wire.Token] = []
            received, received_bytes, stored, frozen = have, 0, have, False
            while not frozen:
                frames = await inbox.all()
                for frame in frames:
                    if isinstance(frame, Arrived):
                        received_bytes += self._verified(frame)
                        received = frame.frame.first_token + frame.frame.tokens
                    elif isinstance(frame, wire.News):
                        tokens += frame.tokens
                frozen = isinstance(frames[-1], wire.Frozen)
                upto = self._credit(received, room_tokens)
                await self._engine.call(partial(_take_in, request_id, frames, upto))
                if received > stored and not frozen:
                    stored, inbox.granted_tokens = received, max(upto, inbox.granted_tokens)
                    link.post(wire.Grant(*key, stored, inbox.granted_tokens))
        link.post(wire.Ack(*key))
        return TakenOver(tuple(tokens), received_bytes)

    async def _import(
        self, link: Link, inbox: Inbox, key: StreamKey, request_id: str, prefill_pod: str
    ) -> Imported:
        offer = await inbox.expect(wire.Offer)
        known_tokens = offer.known_tokens
        grant = await self._first_grant(request_id, known_tokens)
        inbox.granted_tokens = grant.granted_tokens
        link.post(wire.Grant(*key, grant.have_tokens, grant.granted_tokens))
        received = grant.have_tokens
        received_bytes = 0
        last: list[Arrived] = []
        while received < known_tokens:
            pages = await inbox.pages()
            received_bytes += sum(self._verified(page) for page in pages)
            received = pages[-1].frame.first_token + pages[-1].frame.tokens
            if received == known_tokens:
                last = pages  # written together with the start, in one visit to the engine
                break
            upto = self._credit(received, known_tokens)
            write = self._engine.call(partial(_write, request_id, pages, upto))
            write.add_done_callback(inbox.watch)
            if upto > inbox.granted_tokens:
                await write
                inbox.granted_tokens = upto
                link.post(wire.Grant(*key, grant.have_tokens, upto))
        first = await inbox.expect(wire.First)
        output = await self._engine.call(partial(_start, request_id, last, first))
        inbox.check()  # what was written ran before it
        handoff = Handoff(
            prefill_pod=prefill_pod,
            tokens=known_tokens - grant.have_tokens,
            bytes=received_bytes,
            duration_s=(inbox.last_byte_s or 0.0) - (inbox.first_byte_s or 0.0),
        )
        return Imported(output, offer.cached_tokens, offer.queue_s, handoff)

    async def _first_grant(self, request_id: str, known_tokens: int) -> Grant:
        """Waits for blocks: those of streams that end come free in time."""

        def grant(engine: Engine) -> Grant | None:
            first = engine.grant(request_id, self._credit(0, known_tokens))
            if first is None or not first.have_tokens:
                return first
            return engine.grant(request_id, self._credit(first.have_tokens, known_tokens))

        try:
            async with asyncio.timeout(self._timing.grant_s):
                return await self._engine.until(grant)
        except TimeoutError:
            reason = f"the decode pod had no room for {self._timing.grant_s:g} s"
            raise NoRoom("overloaded", reason) from None

    def _credit(self, received_tokens: int, known_tokens: int) -> int:
        window_pages = max(2, _WINDOW_BYTES // self._page_bytes)
        return credit(received_tokens, window_pages, known_tokens, self._page_tokens)

    @staticmethod
    def _verified(page: Arrived) -> int:
        """The payload's size. Raises `HandoffFailed` for a page that is not what was sent."""
        if checksum(page.payload) != page.frame.checksum:
            raise HandoffFailed(
                "prefill_lost",
                f"KV of tokens from {page.frame.first_token} on arrived damaged (checksum)",
            )
        return page.payload.nbytes

    def _count(self, handoff: Handoff) -> None:
        self.counters.streams += 1
        self.counters.bytes += handoff.bytes
        self._on_handoff(handoff)


def _reason(failure: BaseException) -> str:
    """What a failure counts as."""
    match failure:
        case HandoffFailed():
            return failure.counted
        case RequestRefused():
            return "bad_request"
        case asyncio.CancelledError():
            return "ended_early"
        case _:
            return "internal"


def _write(request_id: str, pages: list[Arrived], upto_tokens: int, engine: Engine) -> None:
    """Stores pages and takes blocks for more."""
    _store(request_id, pages, engine)
    engine.grant(request_id, upto_tokens)


def _take_in(request_id: str, frames: list[InboxFrame], upto_tokens: int, engine: Engine) -> None:
    """All that is here of a stream that is decoded elsewhere, and blocks for more."""
    try:
        for frame in frames:
            match frame:
                case wire.News():
                    engine.extend(request_id, [token.token_id for token in frame.tokens])
                case Arrived():
                    engine.write_kv(request_id, frame.frame.first_token, frame.payload)
                case wire.Frozen():
                    engine.resume(request_id)
                    return
                case _:
                    raise ValueError(f"{type(frame).__name__} came of a stream that is decoded")
    except ValueError as error:
        raise HandoffFailed("not_moved", f"the other pod sent a wrong stream: {error}") from None
    engine.grant(request_id, upto_tokens)


def _start(
    request_id: str, pages: list[Arrived], first: wire.First, engine: Engine
) -> StreamOutput:
    _store(request_id, pages, engine)
    token = SampledToken(first.token_id, first.logprob, first.top_logprobs)
    try:
        return engine.start_decode(request_id, token)
    except ValueError as error:
        raise HandoffFailed("prefill_lost", f"the prefill pod sent wrong KV: {error}") from None


def _store(request_id: str, pages: list[Arrived], engine: Engine) -> None:
    try:
        for page in pages:
            engine.write_kv(request_id, page.frame.first_token, page.payload)
    except ValueError as error:
        raise HandoffFailed("prefill_lost", f"the prefill pod sent wrong KV: {error}") from None
