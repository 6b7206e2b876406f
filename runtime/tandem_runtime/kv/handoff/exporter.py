"""The prefill pod's end of the handoff: prompts in, KV pages and a first token out.

Each stream is one task that reads like the protocol; its session routes frames to it. Whatever ends
a stream (an acknowledgement, an abort, a lost connection, an expired lease) ends its task, and the
task's end gives the blocks back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, RequestRefused, SampledToken, StreamOutput
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import Connection, ConnectionLost
from tandem_runtime.kv.handoff.engine_thread import EngineThread
from tandem_runtime.kv.handoff.handshake import HandshakeFailed, Identity, welcome
from tandem_runtime.kv.handoff.lease import Leases, Timing
from tandem_runtime.kv.handoff.pages import checksum
from tandem_runtime.kv.handoff.reader import Page, PageReader
from tandem_runtime.kv.wire import StreamKey
from tandem_runtime.protocol import GenerateRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

_AHEAD_BYTES: Final = 64 << 20
"""KV read out of the cache and not yet sent, for each stream (at least one page)."""


@dataclass(frozen=True)
class Refusal:
    """Why a pod admits no stream now; `code` is an error code of `protocol.GenerateEvent`."""

    code: str
    reason: str


class ExportStreams(NamedTuple):
    """Streams of an exporter by what they wait for."""

    queued: int
    computing: int
    held: int
    """Computed; their KV is kept for the decode pod."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass
class ExportCounters:
    """Since the start, for the metrics."""

    bytes: int = 0
    streams: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Exporter:
    """Listens, and serves every decode pod that connects."""

    def __init__(
        self,
        engine: EngineThread,
        identity: Identity,
        admit: Callable[[], Refusal | None],
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.identity = identity
        self.admit = admit
        self.timing = timing or Timing()
        self.clock = clock
        self.counters = ExportCounters()
        self.reader = PageReader(asyncio.get_running_loop(), identity.layout.page_tokens)
        engine.after_step(self.reader.after_step)
        self.newest: dict[str, _Export] = {}
        """By stream: an attempt ends the older ones, whichever decode pod asked for them."""
        self._server: asyncio.Server | None = None
        self._sessions: dict[_Session, asyncio.Task[None]] = {}

    @property
    def ahead_tokens(self) -> int:
        """How far pages are read out ahead of what was sent."""
        pages = max(1, _AHEAD_BYTES // self.identity.page_bytes)
        return pages * self.identity.layout.page_tokens

    @property
    def streams(self) -> ExportStreams:
        """Streams neither acknowledged nor given up."""
        exports = [e for session in self._sessions for e in session.exports.values()]
        computed = sum(export.computed for export in exports)
        begun = sum(export.begun for export in exports)
        return ExportStreams(len(exports) - begun, begun - computed, computed)

    def end_all(self, code: str, reason: str) -> None:
        """Gives every stream up and tells its decode pod."""
        for export in list(self.newest.values()):
            export.session.end(export.key, code, reason)

    async def listen(self, host: str, port: int) -> int:
        """Returns the port (`port` 0: any)."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, port)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Ends all streams and connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._sessions.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> Connection:
        connection = Connection()
        session = _Session(self, connection)
        task = asyncio.get_running_loop().create_task(session.run())
        self._sessions[session] = task
        task.add_done_callback(lambda _: self._sessions.pop(session))
        return connection


class _Session:
    """One decode pod's connection."""

    def __init__(self, exporter: Exporter, connection: Connection) -> None:
        self.exporter = exporter
        self.connection = connection
        self.exports: dict[StreamKey, _Export] = {}
        self._leases: Leases[StreamKey] = Leases(exporter.timing.lease_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_s = exporter.clock()

    async def run(self) -> None:
        peer = self.connection.peer
        try:
            peer = await welcome(self.connection, self.exporter.identity)
            log.info("decode pod %s connected", peer)
            self._heard_s = self.exporter.clock()
            self.spawn(self._keep_alive())
            while True:
                self._take((await self.connection.receive()).frame)
        except HandshakeFailed as failure:
            log.warning("no handoff with %s: %s", peer, failure)
        except ConnectionLost as lost:
            log.info("decode pod %s is gone: %s", peer, lost)
        except wire.WireError as error:
            log.warning("decode pod %s broke the protocol: %s", peer, error)
        finally:
            self.connection.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _take(self, frame: wire.AnyFrame) -> None:
        now_s = self.exporter.clock()
        self._heard_s = now_s
        match frame:
            case wire.Request():
                self._begin(frame.request)
            case wire.Heartbeat():
                self._leases.extend((StreamKey(*entry) for entry in frame.streams), now_s)
            case wire.Grant() | wire.Ack() | wire.Abort():
                self._leases.extend([frame.key], now_s)
                export = self.exports.get(frame.key)
                if isinstance(frame, wire.Abort):
                    self.spawn(self._abort_for_peer(export, frame))
                elif export is not None:  # a stream that has ended: the frame is late
                    export.take(frame)
            case wire.Aborted():
                pass
            case _:
                raise wire.WireError(f"a decode pod does not send {type(frame).__name__}")

    def _begin(self, request: GenerateRequest) -> None:
        key = StreamKey(request.stream_id, request.epoch)
        other = self.exporter.newest.get(key.stream)
        refusal = self.exporter.admit()
        if other is not None and other.key.epoch >= key.epoch:
            refusal = Refusal("bad_request", f"a newer attempt than {key} runs here")
        if refusal is not None:
            retryable = refusal.code != "bad_request"
            self.spawn(self._tell(wire.Abort(*key, refusal.code, refusal.reason, retryable)))
            return
        if other is not None:
            other.session.end(other.key, "prefill_lost", "a newer attempt of the stream runs")
        export = _Export(self, key, request)
        self.exports[key] = self.exporter.newest[key.stream] = export
        self._leases.begin(key, self.exporter.clock())
        export.task = self.spawn(self._run(export))

    def end(self, key: StreamKey, code: str, reason: str) -> None:
        """Gives a stream up and tells the decode pod."""
        self.exports[key].task.cancel()
        self.spawn(self._tell(wire.Abort(*key, code, reason)))

    async def _run(self, export: _Export) -> None:
        counters = self.exporter.counters
        abort: wire.Abort | None = None
        try:
            await export.transfer()
            counters.streams += 1
        except RequestRefused as error:
            abort = wire.Abort(*export.key, "bad_request", str(error), False)
        except ConnectionLost:
            counters.failures["connection_lost"] += 1
        except asyncio.CancelledError:
            counters.failures["ended_early"] += 1
            raise
        except Exception:
            log.exception("export of %s failed", export.key)
            abort = wire.Abort(*export.key, "internal", "the prefill pod failed")
        finally:
            del self.exports[export.key]
            if self.exporter.newest.get(export.key.stream) is export:
                del self.exporter.newest[export.key.stream]
            self._leases.end(export.key)
            export.release()
        if abort is not None:
            counters.failures[abort.code] += 1
            await self._tell(abort)

    async def _abort_for_peer(self, export: _Export | None, abort: wire.Abort) -> None:
        if export is not None:
            log.info("stream %s: the decode pod gave it up: %s", abort.key, abort.reason)
            export.task.cancel()
            await asyncio.wait([export.task])
        await self._tell(wire.Aborted(*abort.key))

    async def _tell(self, frame: wire.AnyFrame) -> None:
        with contextlib.suppress(ConnectionLost):
            await self.connection.send(frame)

    async def _keep_alive(self) -> None:
        """Heartbeats out, leases in."""
        timing = self.exporter.timing
        while True:
            alive = tuple((key.stream, key.epoch) for key in self.exports)
            await self._tell(wire.Heartbeat(alive))
            await asyncio.sleep(timing.heartbeat_s)
            now_s = self.exporter.clock()
            if now_s - self._heard_s > timing.silence_s:
                self.connection.abort(f"nothing heard for {timing.silence_s:g} s")
            for key in self._leases.expired(now_s):
                reason = f"the decode pod said nothing for {timing.lease_s:g} s"
                self.end(key, "lease_expired", reason)


class _Export:
    """One attempt of one stream."""

    task: asyncio.Task[None]

    def __init__(self, session: _Session, key: StreamKey, request: GenerateRequest) -> None:
        self.key = key
        self.session = session
        self._exporter = session.exporter
        self._request = request
        self._known_tokens = len(request.prompt_ids) + len(request.output_ids)
        self._arrived_s = session.exporter.clock()
        self._changed = asyncio.Event()
        self._first_output: tuple[StreamOutput, float] | None = None
        self._token: SampledToken | None = None
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
        """The protocol, from admission to acknowledgement."""
        send = self.session.connection.send
        engine = self._exporter.engine
        engine.route(str(self.key), self._take_output)
        await engine.call(self._admit)
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
            self._exporter.counters.bytes += page.payload.nbytes
            sent = page.span.end
            self._read_on(sent + self._exporter.ahead_tokens)
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
        engine, reader, request_id = self._exporter.engine, self._exporter.reader, str(self.key)
        engine.unroute(request_id)

        def end(running: Engine) -> None:
            reader.end(request_id)
            running.release(request_id)

        engine.call(end)

    def _admit(self, engine: Engine) -> None:
        request = self._request
        ended = engine.add(
            Request(
                request_id=str(self.key),
                prompt_ids=request.prompt_ids,
                sampling=request.sampling,
                output_ids=request.output_ids,
                tenant=request.tenant,
                cache_salt=request.cache_salt,
                export=True,
            )
        )
        if ended is not None:
            raise RequestRefused(f"stream {self.key} has ended already: {ended}")
        ahead = self._exporter.ahead_tokens
        self._exporter.reader.begin(str(self.key), self._known_tokens, ahead, self._take_pages)

    def _take_output(self, output: StreamOutput, began_s: float) -> None:
        if self._first_output is None:
            self._first_output = output, began_s
        if output.token is not None:
            self._token = output.token
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
        reader, request_id = self._exporter.reader, str(self.key)
        self._exporter.engine.call(lambda engine: reader.allow(engine, request_id, upto_tokens))

    def _reread_from(self, token: int) -> None:
        self._pages.clear()
        self._next_token = token
        reader, request_id = self._exporter.reader, str(self.key)
        self._exporter.engine.call(lambda engine: reader.restart(engine, request_id, token))

    async def _until(self, value: Callable[[], T | None]) -> T:
        while (result := value()) is None:
            self._changed.clear()
            await self._changed.wait()
        return result
