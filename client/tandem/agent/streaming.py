"""`kubectl exec`: a command's stdio over a WebSocket, protocol v5.channel.k8s.io.

Each binary message begins with a byte that names its channel. The last thing that the client gets
is a Status object on the error channel, with the exit status in its details.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import web

from tandem.agent.runtime import SHIM_ENV, exec_command
from tandem.agent.store import RunDir

PROTOCOL: Final = "v5.channel.k8s.io"
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
READ_BYTES: Final = 32 * 1024


@dataclass(frozen=True, slots=True)
class ExecOptions:
    """What the client asked for."""

    command: Sequence[str]
    stdin: bool
    tty: bool


def exit_status(code: int) -> bytes:
    """The Status object that tells how the command ended."""
    if code == 0:
        return json.dumps({"metadata": {}, "status": "Success"}).encode()
    cause = {"reason": "ExitCode", "message": str(code)}
    return json.dumps(
        {
            "metadata": {},
            "status": "Failure",
            "reason": "NonZeroExitCode",
            "message": f"command terminated with non-zero exit code: {code}",
            "details": {"causes": [cause]},
        }
    ).encode()


async def serve_exec(
    request: web.Request, run: RunDir, options: ExecOptions
) -> web.WebSocketResponse:
    """Runs the command and carries its stdio until it ends or the client goes."""
    socket = web.WebSocketResponse(protocols=[PROTOCOL], max_msg_size=0)
    await socket.prepare(request)
    session = await (_open_tty if options.tty else _open_pipes)(run, options)
    readers = [
        asyncio.create_task(_copy_out(socket, channel, reader))
        for channel, reader in session.outputs.items()
    ]
    feeder = asyncio.create_task(_feed(socket, session))
    ended = asyncio.create_task(session.process.wait())
    try:
        await asyncio.wait({ended, feeder}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            # The client went away: its command goes too.
            session.process.kill()
        code = await ended
        await asyncio.gather(*readers)
        with contextlib.suppress(ConnectionError, RuntimeError):
            await socket.send_bytes(bytes([ERROR]) + exit_status(code))
            await socket.close()
    finally:
        feeder.cancel()
        for reader in readers:
            reader.cancel()
        session.close()
    return socket


class _Session:
    """A running command and the ends of its stdio."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        outputs: dict[int, asyncio.StreamReader],
        terminal: int | None = None,
    ) -> None:
        self.process = process
        self.outputs = outputs
        self._terminal = terminal

    async def write(self, data: bytes) -> None:
        """Feeds the command's stdin."""
        if self._terminal is not None:
            await asyncio.to_thread(os.write, self._terminal, data)
        elif self.process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                self.process.stdin.write(data)
                await self.process.stdin.drain()

    def close_stdin(self) -> None:
        """Ends the command's stdin."""
        if self._terminal is None and self.process.stdin is not None:
            self.process.stdin.close()

    def resize(self, width: int, height: int) -> None:
        """Tells the terminal its size."""
        if self._terminal is not None:
            size = struct.pack("HHHH", height, width, 0, 0)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Lets go of the terminal."""
        if self._terminal is not None:
            os.close(self._terminal)


async def _open_pipes(run: RunDir, options: ExecOptions) -> _Session:
    process = await asyncio.create_subprocess_exec(
        *exec_command(run, options.command),
        stdin=asyncio.subprocess.PIPE if options.stdin else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env=SHIM_ENV,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    return _Session(process, {STDOUT: process.stdout, STDERR: process.stderr})


async def _open_tty(run: RunDir, options: ExecOptions) -> _Session:
    master, slave = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *exec_command(run, options.command, tty=True),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=SHIM_ENV,
        )
    finally:
        os.close(slave)
    reader = asyncio.StreamReader()
    # The transport owns its descriptor and closes it; writing keeps the other.
    pipe = os.fdopen(os.dup(master), "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    return _Session(process, {STDOUT: reader}, master)


async def _copy_out(
    socket: web.WebSocketResponse, channel: int, reader: asyncio.StreamReader
) -> None:
    # A terminal whose last user is gone reads as an I/O error.
    with contextlib.suppress(OSError, RuntimeError):
        while data := await reader.read(READ_BYTES):
            await socket.send_bytes(bytes([channel]) + data)


async def _feed(socket: web.WebSocketResponse, session: _Session) -> None:
    """Takes the client's messages until it goes away."""
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], message.data[1:]
        if channel == STDIN and data:
            await session.write(data)
        elif channel == CLOSE and data[:1] == bytes([STDIN]):
            session.close_stdin()
        elif channel == RESIZE:
            size = json.loads(data)
            session.resize(size["Width"], size["Height"])
