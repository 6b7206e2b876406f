"""A receiving pod's connection to one sending pod, shared by all streams between the two."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import Connection, ConnectionLost, Received, connect
from tandem_runtime.kv.handoff.handshake import HandshakeFailed, Identity, greet
from tandem_runtime.kv.handoff.lease import Leases, Timing
from tandem_runtime.kv.wire import StreamKey
from tandem_runtime.protocol import PrefillTarget

log = logging.getLogger(__name__)

F = TypeVar("F", wire.Offer, wire.First)
_UNSENT_FRAMES: Final = 10_000
"""A pod that lets so many small frames lie does not read any more."""


class HandoffFailed(Exception):
    """This attempt gets no KV; `code` is an error code of `protocol.GenerateEvent`.

    `counted`: the reason in the metrics, where it says more than the code.
    """

    def __init__(
        self, code: str, reason: str, *, retryable: bool = True, counted: str | None = None
    ) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.retryable = retryable
        self.counted = counted or code


class PeerAborted(HandoffFailed):
    """The other pod gave the stream up, and need not be told."""


class NoRoom(HandoffFailed):
    """This pod itself has no blocks for the stream; the other pod did no wrong."""


@dataclass(frozen=True)
class Arrived:
    """Pages that are here and not yet in the cache."""

    frame: wire.Pages
    payload: memoryview


InboxFrame = wire.Offer | wire.First | wire.News | wire.Frozen | Arrived


class Inbox:
    """What came for one stream, in order."""

    def __init__(self) -> None:
        self.granted_tokens = 0
        self.first_byte_s: float | None = None
        self.last_byte_s: float | None = None
        self._frames: deque[InboxFrame] = deque()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def put(self, received: Received, now_s: float) -> None:
        frame, payload, began_s = received
        if isinstance(frame, wire.Pages):
            if frame.first_token + frame.tokens > self.granted_tokens:
                self.end(HandoffFailed("prefill_lost", "the other pod sent more than granted"))
                return
            self.first_byte_s = self.first_byte_s or began_s
            self.last_byte_s = now_s
            self._frames.append(Arrived(frame, payload))
        elif isinstance(frame, wire.Offer | wire.First | wire.News | wire.Frozen):
            self._frames.append(frame)
        self._changed.set()

    def end(self, failure: BaseException) -> None:
        """Whoever waits is told; what came is dropped."""
        if self._failure is None:
            self._failure = failure
        self._frames.clear()
        self._changed.set()

    def watch(self, work: asyncio.Future[None]) -> None:
        """Ends with the failure of work that nobody waits for."""
        if not work.cancelled() and (failure := work.exception()) is not None:
            self.end(failure)

    def check(self) -> None:
        """Raises what it ended with."""
        if self._failure is not None:
            raise self._failure

    async def expect(self, kind: type[F]) -> F:
        """The next frame, which must be of this kind. Raises `HandoffFailed`."""
        await self._wait()
        frame = self._frames.popleft()
        if not isinstance(frame, kind):
            raise HandoffFailed("prefill_lost", f"{kind.__name__} was due from the prefill pod")
        return frame

    async def pages(self) -> list[Arrived]:
        """All pages that are here, at least one. Raises `HandoffFailed`."""
        await self._wait()
        pages: list[Arrived] = []
        while self._frames and isinstance(page := self._frames[0], Arrived):
            pages.append(page)
            self._frames.popleft()
        if not pages:
            raise HandoffFailed("prefill_lost", "KV was due from the prefill pod")
        return pages

    async def all(self) -> list[InboxFrame]:
        """All frames that are here, at least one. Raises `HandoffFailed`."""
        await self._wait()
        frames = list(self._frames)
        self._frames.clear()
        return frames

    async def _wait(self) -> None:
        while not self._frames and self._failure is None:
            self._changed.clear()
            await self._changed.wait()
        self.check()


class Link:
    """Frames are posted without waiting: those of a decode pod are small."""

    def __init__(
        self, target: PrefillTarget, identity: Identity, timing: Timing, clock: Callable[[], float]
    ) -> None:
        self._target = target
        self._identity = identity
        self._timing = timing
        self._clock = clock
        self._inboxes: dict[StreamKey, Inbox] = {}
        self._leases: Leases[StreamKey] = Leases(timing.lease_s)
        self._outbox: asyncio.Queue[wire.AnyFrame] = asyncio.Queue()
        self._connection: Connection | None = None
        self._heard_s = clock()
        self.late_pages = 0
        """Pages of streams that had ended here; they were dropped."""
        self.closed = False

    async def open(self) -> None:
        """Raises `HandoffFailed`."""
        pod, port = self._target.pod, self._target.port
        try:
            self._connection = await connect(self._target.host, port, self._timing.connect_s)
            await greet(self._connection, self._identity, pod)
        except (ConnectionLost, HandshakeFailed, wire.WireError) as error:
            self.closed = True
            if self._connection is not None:
                self._connection.close()
            reason = f"no KV from pod {pod}: {error}"
            counted = "refused" if isinstance(error, HandshakeFailed) else "unreachable"
            raise HandoffFailed("prefill_lost", reason, counted=counted) from None
        self._heard_s = self._clock()

    async def run(self) -> None:
        """Serves the connection until it ends; then every stream fails."""
        assert self._connection is not None
        tasks = [
            asyncio.get_running_loop().create_task(work) for work in (self._write(), self._keep())
        ]
        reason = "this pod is shutting down"
        try:
            while True:
                self._take(await self._connection.receive())
        except (ConnectionLost, wire.WireError) as error:
            reason = str(error)
        finally:
            self.closed = True
            self._connection.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            lost = f"pod {self._target.pod} is gone: {reason}"
            for inbox in self._inboxes.values():
                inbox.end(PeerAborted("prefill_lost", lost))

    def begin(self, key: StreamKey) -> Inbox:
        inbox = self._inboxes[key] = Inbox()
        self._leases.begin(key, self._clock())
        return inbox

    def end(self, key: StreamKey) -> None:
        """Later frames of this stream are late, and dropped."""
        self._inboxes.pop(key, None)
        self._leases.end(key)

    def post(self, frame: wire.AnyFrame) -> None:
        if self._outbox.qsize() >= _UNSENT_FRAMES and self._connection is not None:
            self._connection.abort("the other pod does not read")
        self._outbox.put_nowait(frame)

    def _take(self, received: Received) -> None:
        now_s = self._heard_s = self._clock()
        frame = received.frame
        if isinstance(frame, wire.Heartbeat):
            self._leases.extend((StreamKey(*entry) for entry in frame.streams), now_s)
            return
        if not isinstance(frame, wire.StreamFrame):
            raise wire.WireError(f"a sending pod does not send {type(frame).__name__}")
        self._leases.extend([frame.key], now_s)
        inbox = self._inboxes.get(frame.key)
        if isinstance(frame, wire.Abort):
            self.post(wire.Aborted(*frame.key))
        if inbox is None:
            self.late_pages += isinstance(frame, wire.Pages)
        elif isinstance(frame, wire.Abort):
            inbox.end(PeerAborted(frame.code, frame.reason, retryable=frame.retryable))
        else:
            inbox.put(received, now_s)

    async def _write(self) -> None:
        assert self._connection is not None
        with contextlib.suppress(ConnectionLost):
            while True:
                await self._connection.send(await self._outbox.get())

    async def _keep(self) -> None:
        """Heartbeats out, leases in."""
        assert self._connection is not None
        timing = self._timing
        while True:
            self.post(wire.Heartbeat(tuple((k.stream, k.epoch) for k in self._inboxes)))
            await asyncio.sleep(timing.heartbeat_s)
            now_s = self._clock()
            if now_s - self._heard_s > timing.silence_s:
                self._connection.abort(f"nothing heard for {timing.silence_s:g} s")
                return  # that reason ends every stream; their leases end with the connection
            for key in self._leases.expired(now_s):
                reason = f"pod {self._target.pod} was silent for {timing.lease_s:g} s"
                self._inboxes[key].end(HandoffFailed("lease_expired", reason))


class Links:
    """Connections by pod, opened when first needed and again after a loss."""

    def __init__(self, identity: Identity, timing: Timing, clock: Callable[[], float]) -> None:
        self._identity = identity
        self._timing = timing
        self._clock = clock
        self._links: dict[PrefillTarget, Link] = {}
        self._opening: dict[PrefillTarget, asyncio.Task[Link]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._late_pages = 0

    @property
    def late_pages(self) -> int:
        """Of all connections, closed ones too."""
        return self._late_pages + sum(link.late_pages for link in self._links.values())

    async def to(self, target: PrefillTarget) -> Link:
        """Raises `HandoffFailed`. Streams that ask at the same time share the handshake."""
        link = self._links.get(target)
        if link is not None and not link.closed:
            return link
        if target not in self._opening:
            opening = asyncio.get_running_loop().create_task(self._open(target))
            self._opening[target] = opening
            opening.add_done_callback(lambda _: self._opening.pop(target))
        return await asyncio.shield(self._opening[target])

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _open(self, target: PrefillTarget) -> Link:
        link = Link(target, self._identity, self._timing, self._clock)
        await link.open()
        self._links[target] = link
        task = asyncio.get_running_loop().create_task(link.run())
        self._running.add(task)
        task.add_done_callback(lambda done: self._forget(target, link, done))
        return link

    def _forget(self, target: PrefillTarget, link: Link, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._links.get(target) is link:
            del self._links[target]
            self._late_pages += link.late_pages
