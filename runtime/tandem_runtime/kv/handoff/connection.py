"""Frames over one TCP connection; payloads land in their own buffer without further copies.

Backpressure both ways: `send` waits while the peer does not read, and reading stops while the
owner has not taken what came.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, cast

from tandem_runtime.kv import wire

_UNREAD_FRAMES: Final = 32
"""Frames that may wait for the owner before reading stops."""


class ConnectionLost(Exception):
    """The connection is closed; the message says why."""


class Received(NamedTuple):
    frame: wire.AnyFrame
    payload: memoryview
    began_s: float
    """When its first bytes came, on `time.monotonic`."""


class Connection(asyncio.BufferedProtocol):
    """Both sides' end. Made by `connect` or by a server's accept."""

    def __init__(self) -> None:
        self._limits = wire.STRANGER
        self._transport: asyncio.Transport | None = None
        self._lost: ConnectionLost | None = None
        self._received: deque[Received] = deque()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._sending = asyncio.Lock()
        self._paused = False
        self._buffer = memoryview(bytearray(wire.PREFIX.size))
        self._filled = 0
        self._began_s = 0.0
        self._take: Callable[[memoryview], None] = self._take_prefix
        """What to do with the buffer once it is full."""

    def trust(self, payload_bytes: int) -> None:
        """The peer proved the secret: accept all frames, and payloads of up to this size."""
        self._limits = wire.trusted(payload_bytes)

    @property
    def peer(self) -> str:
        """Host and port, for messages."""
        name = None if self._transport is None else self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if name else "an unknown peer"

    async def receive(self) -> Received:
        """The next frame. Raises `ConnectionLost` once all that came has been taken."""
        while not self._received:
            if self._lost is not None:
                raise self._lost
            self._readable.clear()
            await self._readable.wait()
        received = self._received.popleft()
        if self._paused and len(self._received) < _UNREAD_FRAMES and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return received

    async def send(self, frame: wire.AnyFrame, payload: memoryview | None = None) -> None:
        """Waits until the peer reads. Raises `ConnectionLost`."""
        async with self._sending:
            await self._writable.wait()
            if self._lost is not None or self._transport is None:
                raise self._lost or ConnectionLost("the connection is not open")
            if payload is None:
                self._transport.write(wire.encode(frame))
            else:
                self._transport.write(wire.encode(frame, payload.nbytes))
                self._transport.write(payload)

    def close(self, reason: str = "closed by this side") -> None:
        """What was sent still goes out."""
        self._end(ConnectionLost(reason))
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """At once; what was sent may be lost."""
        self._end(ConnectionLost(reason))
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's side ---------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connected = transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(ConnectionLost(str(exc) if exc else "the peer closed the connection"))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._buffer):
            return
        try:
            self._take(self._buffer)
        except wire.WireError as error:
            self.abort(str(error))

    def eof_received(self) -> bool:
        return False

    def _fill(self, size: int, take: Callable[[memoryview], None]) -> None:
        self._buffer = memoryview(bytearray(size))
        self._filled = 0
        self._take = take

    def _take_prefix(self, prefix: memoryview) -> None:
        self._began_s = time.monotonic()
        header_bytes, payload_bytes = wire.decode_prefix(prefix, self._limits)
        self._fill(header_bytes, partial(self._take_header, payload_bytes))

    def _take_header(self, payload_bytes: int, header: memoryview) -> None:
        frame = wire.decode_header(header, payload_bytes, self._limits)
        if payload_bytes:
            self._fill(payload_bytes, partial(self._deliver, frame))
        else:
            self._deliver(frame, memoryview(b""))

    def _deliver(self, frame: wire.AnyFrame, payload: memoryview) -> None:
        self._fill(wire.PREFIX.size, self._take_prefix)
        if self._lost is not None:
            return
        self._received.append(Received(frame, payload, self._began_s))
        self._readable.set()
        if len(self._received) >= _UNREAD_FRAMES and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _end(self, lost: ConnectionLost) -> None:
        if self._lost is None:
            self._lost = lost
        self._readable.set()
        self._writable.set()


async def connect(host: str, port: int, timeout_s: float) -> Connection:
    """Raises `ConnectionLost`."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await loop.create_connection(Connection, host, port)
    except TimeoutError:
        raise ConnectionLost(f"{host}:{port} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ConnectionLost(f"{host}:{port} cannot be reached: {error}") from None
    return connection
