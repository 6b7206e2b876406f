"""The sending end of the handoff: prompts in, KV pages and a first token out; running streams, too.

Each stream is one task that reads like the protocol; its session routes frames to it. Whatever ends
a stream (an acknowledgement, an abort, a lost connection, an expired lease) ends its task, and the
task's end gives the blocks back, or lets a stream that was to move go on here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.engine.sequence import NotFinite, RequestRefused
from tandem_runtime.kv import wire
from tandem_runtime.kv.handoff.connection import Connection, ConnectionLost
from tandem_runtime.kv.handoff.counters import Counters
from tandem_runtime.kv.handoff.departure import CannotMove, Departure, Departures, Running
from tandem_runtime.kv.handoff.engine_thread import EngineThread
from tandem_runtime.kv.handoff.export import Export, PageSource
from tandem_runtime.kv.handoff.handshake import HandshakeFailed, Identity, welcome
from tandem_runtime.kv.handoff.lease import Leases, Timing
from tandem_runtime.kv.handoff.reader import PageReader
from tandem_runtime.kv.wire import StreamKey
from tandem_runtime.protocol import GenerateRequest

log = logging.getLogger(__name__)

_AHEAD_BYTES: Final = 64 << 20
"""KV read out of the cache and not yet sent, for each stream (at least one page)."""


@dataclass(frozen=True)
class Refusal:
    """Why a pod admits no stream now; `code` is an error code of `protocol.GenerateEvent`."""

    code: str
    reason: str


FindRunning = Callable[[str, int], Running | Refusal]
"""The stream of this id that a pod may take over as an attempt of this epoch."""
_DECODES_NOTHING: Final = Refusal("not_moved", "this pod decodes nothing")


class ExportStreams(NamedTuple):
    """Streams of an exporter by what they wait for."""

    queued: int
    computing: int
    held: int
    """Computed; their KV is kept for the decode pod."""

    @property
    def total(self) -> int:
        return sum(self)


class Exporter:
    """Listens, and serves every pod that connects."""

    def __init__(
        self,
        engine: EngineThread,
        identity: Identity,
        grammars: Grammars,
        admit: Callable[[], Refusal | None],
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
        find: FindRunning = lambda stream, epoch: _DECODES_NOTHING,
        on_moved: Callable[[float], None] = lambda pause_s: None,
    ) -> None:
        self.identity = identity
        self.admit = admit
        self.timing = timing or Timing()
        self.clock = clock
        self.counters = Counters()
        page_tokens = identity.layout.page_tokens
        reader = PageReader(asyncio.get_running_loop(), page_tokens)
        engine.after_step(reader.after_step)
        ahead_pages = max(1, _AHEAD_BYTES // identity.page_bytes)
        self.source = PageSource(engine, reader, grammars, ahead_pages * page_tokens, self.counters)
        self.find = find
        self.departures = Departures(engine, page_tokens, identity.page_bytes, Counters(), on_moved)
        self.newest: dict[str, tuple[_Session, Export | Departure]] = {}
        """By stream: an attempt ends the older ones, whichever pod asked for them."""
        self._server: asyncio.Server | None = None
        self._sessions: dict[_Session, asyncio.Task[None]] = {}

    @property
    def streams(self) -> ExportStreams:
        """Prompts neither acknowledged nor given up."""
        outgoing = [e for session in self._sessions for e in session.exports.values()]
        exports = [e for e in outgoing if isinstance(e, Export)]
        computed = sum(export.computed for export in exports)
        begun = sum(export.begun for export in exports)
        return ExportStreams(len(exports) - begun, begun - computed, computed)

    def end_all(self, code: str, reason: str) -> None:
        """Gives every stream up and tells its decode pod."""
        for session, export in list(self.newest.values()):
            session.end(export.key, code, reason)

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
    """One receiving pod's connection."""

    def __init__(self, exporter: Exporter, connection: Connection) -> None:
        self.exporter = exporter
        self.connection = connection
        self.exports: dict[StreamKey, Export | Departure] = {}
        self._leases: Leases[StreamKey] = Leases(exporter.timing.lease_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_s = exporter.clock()
        self._peer = connection.peer

    async def run(self) -> None:
        peer = self._peer
        try:
            peer = self._peer = await welcome(self.connection, self.exporter.identity)
            log.info("pod %s connected", peer)
            self._heard_s = self.exporter.clock()
            self.spawn(self._keep_alive())
            while True:
                self._take((await self.connection.receive()).frame)
        except HandshakeFailed as failure:
            log.warning("no handoff with %s: %s", peer, failure)
            self.exporter.counters.fail("refused")
        except ConnectionLost as lost:
            log.info("pod %s is gone: %s", peer, lost)
            self._lost_its_peer()
        except wire.WireError as error:
            log.warning("pod %s broke the protocol: %s", peer, error)
            self._lost_its_peer()
        finally:
            self.connection.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _lost_its_peer(self) -> None:
        for export in self.exports.values():
            export.given_up = "connection_lost"

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
                self._export(frame.request)
            case wire.Take():
                self._depart(frame)
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
                raise wire.WireError(f"a receiving pod does not send {type(frame).__name__}")

    def _export(self, request: GenerateRequest) -> None:
        key = StreamKey(request.stream_id, request.epoch)
        refusal = self.exporter.admit() or self._supersede(key)
        if refusal is not None:
            self._refuse(key, refusal, self.exporter.counters)
            return
        source = self.exporter.source
        self._begin(Export(key, request, self.connection, source, self.exporter.clock()))

    def _depart(self, take: wire.Take) -> None:
        shared = self.exporter.departures
        found = self.exporter.find(take.stream, take.epoch)
        if not isinstance(found, Refusal):
            found = self._supersede(take.key) or found
        if isinstance(found, Refusal):
            self._refuse(take.key, found, shared.counters)
            return
        self._begin(Departure(take, found, self.connection, shared, self._peer))

    def _supersede(self, key: StreamKey) -> Refusal | None:
        """Ends an older attempt of the stream; a refusal where a newer one runs."""
        session, other = self.exporter.newest.get(key.stream, (self, None))
        if other is None:
            return None
        if other.key.epoch >= key.epoch:
            return Refusal("bad_request", f"a newer attempt than {key} runs here")
        session.end(other.key, "prefill_lost", "a newer attempt of the stream runs")
        return None

    def _refuse(self, key: StreamKey, refusal: Refusal, counters: Counters) -> None:
        counters.fail(refusal.code)
        retryable = refusal.code != "bad_request"
        self.spawn(self._tell(wire.Abort(*key, refusal.code, refusal.reason, retryable)))

    def _begin(self, export: Export | Departure) -> None:
        self.exports[export.key] = export
        self.exporter.newest[export.key.stream] = self, export
        self._leases.begin(export.key, self.exporter.clock())
        export.task = self.spawn(self._run(export))
        export.task.add_done_callback(lambda _: self._forget(export))

    def end(self, key: StreamKey, code: str, reason: str) -> None:
        """Gives a stream up and tells the other pod."""
        export = self.exports[key]
        export.given_up = code
        export.task.cancel()
        self.spawn(self._tell(wire.Abort(*key, code, reason)))

    async def _run(self, export: Export | Departure) -> None:
        counters = export.counters
        abort: wire.Abort | None = None
        try:
            await export.transfer()
            counters.streams += 1
        except RequestRefused as error:
            abort = wire.Abort(*export.key, "bad_request", str(error), False)
        except NotFinite as error:
            abort = wire.Abort(*export.key, error.code, str(error), False)
        except CannotMove as error:
            abort = wire.Abort(*export.key, "not_moved", str(error))
        except ConnectionLost:
            counters.fail("connection_lost")
        except Exception:
            log.exception("export of %s failed", export.key)
            abort = wire.Abort(*export.key, "internal", "the sending pod failed")
        if abort is not None:
            counters.fail(abort.code)
            self.spawn(self._tell(abort))

    def _forget(self, export: Export | Departure) -> None:
        """After the task: one that is cancelled before it began runs no line of its own."""
        if export.task.cancelled():
            export.counters.fail(export.given_up)
        del self.exports[export.key]
        if self.exporter.newest.get(export.key.stream) == (self, export):
            del self.exporter.newest[export.key.stream]
        self._leases.end(export.key)
        export.release()

    async def _abort_for_peer(self, export: Export | Departure | None, abort: wire.Abort) -> None:
        if export is not None:
            log.info("stream %s: the other pod gave it up: %s", abort.key, abort.reason)
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
                return  # that reason ends every export; their leases end with the connection
            for key in self._leases.expired(now_s):
                reason = f"the receiving pod said nothing for {timing.lease_s:g} s"
                self.end(key, "lease_expired", reason)
