"""Streams that outlive their gateway.

A stream whose request has a journal runs for itself; whoever asked reads along. When the
connection breaks, the stream goes on for a while, and what came of it is kept beyond its end, so
that another gateway can go on with it. A newer attempt takes the stream over where it stands, and
the older one's reader is told so and cut off: that is the fence against a gateway that was stopped
and wakes. A gateway whose client has left says so, and the stream ends at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import msgspec

from tandem_runtime.protocol import (
    GenerateEvent,
    GenerateRequest,
    HeldStream,
    TokenLogprob,
)
from tandem_runtime.serve.streams import StreamService

MOST_STREAMS: Final = 4096
MOST_BYTES: Final = 64 << 20
"""Of all streams that nobody reads."""
_TOKEN_BYTES: Final = 40
"""Of an id in a list, about; ids of a prompt are objects of their own."""
_LOGPROB_BYTES: Final = 120


class KeptStreams:
    """In front of a pod's `StreamService`."""

    def __init__(
        self,
        service: StreamService,
        hold_s: float,
        *,
        most_streams: int = MOST_STREAMS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._service = service
        self._hold_s = hold_s
        self._most_streams, self._most_bytes = most_streams, most_bytes
        self._streams: dict[str, _Kept] = {}
        self._unread: dict[str, int] = {}
        """Bytes of the streams that nobody reads, by id, the longest unread first."""
        self._unread_bytes = 0
        self.outcomes: Counter[str] = Counter()
        """Of streams whose connection broke: `resumed`, `cancelled`, `expired`, `displaced`."""

    @property
    def held(self) -> int:
        """Streams that run though their connection broke."""
        return sum(not self._streams[id_].ended for id_ in self._unread)

    def generate(self, ask: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """As `StreamService.generate`; closing it cancels a stream that has no journal."""
        return self._events(ask) if ask.journal else self._service.generate(ask)

    def find(self, answer: str) -> list[HeldStream]:
        """The streams of an answer, whose ids are `answer`.NUMBER."""
        return [
            kept.as_held()
            for id_, kept in self._streams.items()
            if id_.rpartition(".")[0] == answer and kept.begun
        ]

    def cancel(self, stream_id: str, epoch: int) -> None:
        """Nobody wants more of this attempt, or older ones. What came of it is still kept."""
        kept = self._streams.get(stream_id)
        if kept is None or kept.epoch > epoch or kept.ended:
            return
        if stream_id in self._unread:
            self.outcomes["cancelled"] += 1
        kept.stop()

    async def close(self) -> None:
        """Ends all of them; nobody is told."""
        running = [kept.task for kept in self._streams.values()]
        for kept in list(self._streams.values()):
            kept.reader = None
            self._forget(kept)
        await asyncio.gather(*running, return_exceptions=True)

    async def _events(self, ask: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        kept = self._streams.get(ask.stream_id)
        if kept is not None and kept.epoch >= ask.epoch:
            reason = f"attempt {ask.epoch} of stream {ask.stream_id} is older than one that runs"
            yield GenerateEvent(ask.epoch, error=reason, error_code="superseded")
            return
        if kept is not None and kept.can_go_on_from(ask):
            self._resumed(kept, ask)
        else:
            kept = self._begin(ask)
        reader = kept.read(ask)
        try:
            while True:
                event = await reader.get()
                yield event
                if event.error is not None or event.finish_reason is not None:
                    return
        finally:
            if kept.reader is reader:
                self._left(kept)

    def _begin(self, ask: GenerateRequest) -> _Kept:
        older = self._streams.get(ask.stream_id)
        if older is not None:
            older.supersede()
            self._forget(older)
        kept = self._streams[ask.stream_id] = _Kept(ask)
        kept.task = asyncio.create_task(kept.run(self._service.generate), name=ask.stream_id)
        kept.task.add_done_callback(lambda _: self._ended(kept))
        return kept

    def _resumed(self, kept: _Kept, ask: GenerateRequest) -> None:
        if self._is_read(kept) and not kept.ended:
            self.outcomes["resumed"] += 1
        self._service.renew(ask.stream_id, ask.epoch)

    def _left(self, kept: _Kept) -> None:
        """Its reader is gone: it has the end, or its connection broke."""
        kept.reader = None
        if self._streams.get(kept.stream_id) is not kept:
            return
        if not kept.ended and not kept.begun:
            # No client has read of it, and none can come back: it asks again.
            self._forget(kept)
            return
        self._is_unread(kept)

    def _ended(self, kept: _Kept) -> None:
        if self._streams.get(kept.stream_id) is not kept:
            return
        if kept.is_moved or not kept.begun:
            self._forget(kept)
        elif kept.reader is None:
            self._is_read(kept)
            self._is_unread(kept)  # its end is kept as long as it itself would have been

    def _is_unread(self, kept: _Kept) -> None:
        self._unread[kept.stream_id] = kept.bytes
        self._unread_bytes += kept.bytes
        kept.keep_for(self._hold_s, self._expired)
        self._make_room()

    def _is_read(self, kept: _Kept) -> bool:
        """Or forgotten; whether it was unread."""
        kept.keep_for(None, self._expired)
        held_bytes = self._unread.pop(kept.stream_id, None)
        self._unread_bytes -= held_bytes or 0
        return held_bytes is not None

    def _expired(self, kept: _Kept) -> None:
        if not kept.ended:
            self.outcomes["expired"] += 1
        self._forget(kept)

    def _make_room(self) -> None:
        """Those that have ended go first: the others hold a client's only copy as well, and KV."""
        while len(self._unread) > self._most_streams or self._unread_bytes > self._most_bytes:
            ended = (id_ for id_ in self._unread if self._streams[id_].ended)
            kept = self._streams[next(ended, next(iter(self._unread)))]
            if not kept.ended:
                self.outcomes["displaced"] += 1
            self._forget(kept)

    def _forget(self, kept: _Kept) -> None:
        if self._streams.get(kept.stream_id) is kept:
            self._is_read(kept)
            del self._streams[kept.stream_id]
        kept.stop()


class _Reader:
    """Events for one attempt."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._events: asyncio.Queue[GenerateEvent] = asyncio.Queue()

    def put(self, event: GenerateEvent) -> None:
        if event.epoch != self.epoch:
            event = msgspec.structs.replace(event, epoch=self.epoch)
        self._events.put_nowait(event)

    async def get(self) -> GenerateEvent:
        return await self._events.get()


class _Kept:
    """One stream, as it runs, and what came of it."""

    task: asyncio.Task[None]

    def __init__(self, ask: GenerateRequest) -> None:
        self.stream_id = ask.stream_id
        self.epoch = ask.epoch
        self.reader: _Reader | None = None
        self.ended = False
        self.is_moved = False
        self._ask = ask
        self._ids = list(ask.output_ids)
        self._logprobs: list[TokenLogprob] = []
        """Of the last ones of `_ids`: those of earlier attempts have none."""
        self._top_logprobs: list[tuple[TokenLogprob, ...]] = []
        self._first: GenerateEvent | None = None
        self._end: GenerateEvent | None = None
        """With a finish or an error."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> bool:
        """Whether a client may have a token of it."""
        return bool(self._ids) or self._ask.take_from is not None

    @property
    def bytes(self) -> int:
        """About."""
        ids = len(self._ask.prompt_ids) + len(self._ids)
        top = sum(map(len, self._top_logprobs))
        logprobs = (len(self._logprobs) + top) * _LOGPROB_BYTES
        return ids * _TOKEN_BYTES + logprobs + len(self._ask.journal)

    async def run(
        self, generate: Callable[[GenerateRequest], AsyncGenerator[GenerateEvent, None]]
    ) -> None:
        """Until the stream's end, whoever reads."""
        try:
            async with aclosing(generate(self._ask)) as events:
                async for event in events:
                    self._take(event)
        finally:
            self.ended = True
            if self._end is None:
                told = "the pod ended this stream"
                self._take(
                    GenerateEvent(self.epoch, error=told, error_code="draining", retryable=True)
                )

    def stop(self) -> None:
        if not self.task.done():
            self.ended = True
            self.task.cancel()

    def read(self, ask: GenerateRequest) -> _Reader:
        """Events behind `ask.output_ids`, for this attempt, and for no older one any more."""
        self.supersede()
        self.epoch = ask.epoch
        self.reader = _Reader(ask.epoch)
        if self._ids[len(ask.output_ids) :] or self._end is not None:
            self.reader.put(self._since(len(ask.output_ids)))
        return self.reader

    def supersede(self) -> None:
        if self.reader is not None:
            reason = "this stream goes on through another gateway"
            event = GenerateEvent(self.epoch, error=reason, error_code="superseded")
            self.reader.put(event)
            self.reader = None

    def can_go_on_from(self, ask: GenerateRequest) -> bool:
        """Whether it runs, or has come to its finish, and begins as that attempt does."""
        whole = self._end is not None and self._end.finish_reason is not None
        begins = self._ids[: len(ask.output_ids)] == ask.output_ids
        return (whole or not self.ended) and begins and ask.take_from is None

    def as_held(self) -> HeldStream:
        request = msgspec.structs.replace(
            self._ask, epoch=self.epoch, output_ids=[], prefill=None, take_from=None
        )
        return HeldStream(request, self._since(0))

    def keep_for(self, hold_s: float | None, expire: Callable[[_Kept], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if hold_s is not None:
            self._timer = asyncio.get_running_loop().call_later(hold_s, expire, self)

    def _take(self, event: GenerateEvent) -> None:
        if self._first is None:
            self._first = event
        self._ids += event.token_ids
        self._logprobs += event.logprobs
        self._top_logprobs += event.top_logprobs
        if event.error is not None or event.finish_reason is not None:
            self.ended = True
            self._end = event
            self.is_moved = event.error_code == "moved"
        if self.reader is not None:
            self.reader.put(event)

    def _since(self, position: int) -> GenerateEvent:
        """All tokens from there on as one event, described as the first one was."""
        first = self._first or GenerateEvent(self.epoch)
        skipped = max(0, position - (len(self._ids) - len(self._logprobs)))
        return GenerateEvent(
            epoch=self.epoch,
            token_ids=tuple(self._ids[position:]),
            logprobs=tuple(self._logprobs[skipped:]),
            top_logprobs=tuple(self._top_logprobs[skipped:]),
            finish_reason=None if self._end is None else self._end.finish_reason,
            prompt_tokens=first.prompt_tokens or len(self._ask.prompt_ids),
            cached_tokens=first.cached_tokens,
            queue_s=first.queue_s,
            handoff=first.handoff,
        )
