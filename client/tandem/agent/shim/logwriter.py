"""A container's output as CRI log records: TIME STREAM TAG TEXT."""

from __future__ import annotations

import fcntl
import os
import select
import time
from typing import Final

FILE_LIMIT_BYTES: Final = 64 * 2**20
"""A fuller log is set aside as PATH.1 (replacing the one before), and a new one begins."""
LINE_LIMIT_BYTES: Final = 16 * 1024
"""A longer line is cut into partial records (tag P), as container runtimes do."""


class LogWriter:
    """Writes one log file; what is complete is written at once."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = self._open()
        self._pending = {"stdout": b"", "stderr": b""}

    def feed(self, stream: str, data: bytes) -> None:
        """Takes what was read from a stream; whole lines are written at once."""
        *lines, rest = (self._pending[stream] + data).split(b"\n")
        records = [piece for line in lines for piece in self._records(stream, line, b"F")]
        while len(rest) >= LINE_LIMIT_BYTES:
            records += self._record(stream, rest[:LINE_LIMIT_BYTES], b"P")
            rest = rest[LINE_LIMIT_BYTES:]
        self._pending[stream] = rest
        if records:
            os.write(self._fd, b"".join(records))
            if os.fstat(self._fd).st_size > FILE_LIMIT_BYTES:
                os.replace(self._path, f"{self._path}.1")
                os.close(self._fd)
                self._fd = self._open()

    def close(self) -> None:
        """Writes what had no newline at its end."""
        for stream, rest in self._pending.items():
            if rest:
                os.write(self._fd, b"".join(self._records(stream, rest, b"P")))
        os.close(self._fd)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _records(self, stream: str, line: bytes, last_tag: bytes) -> list[bytes]:
        pieces = []
        while len(line) > LINE_LIMIT_BYTES:
            pieces += self._record(stream, line[:LINE_LIMIT_BYTES], b"P")
            line = line[LINE_LIMIT_BYTES:]
        return pieces + self._record(stream, line, last_tag)

    @staticmethod
    def _record(stream: str, text: bytes, tag: bytes) -> list[bytes]:
        now_ns = time.time_ns()
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 10**9))
        head = f"{seconds}.{now_ns % 10**9:09d}Z {stream} ".encode()
        return [head, tag, b" ", text, b"\n"]


def copy_output(path: str, streams: dict[int, str]) -> None:
    """Copies both streams into the log until every writer has closed them."""
    writer = LogWriter(path)
    poller = select.poll()
    for fd in streams:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        poller.register(fd, select.POLLIN)
    open_fds = set(streams)
    while open_fds:
        for fd, _ in poller.poll():
            data = os.read(fd, 65536)
            if data:
                writer.feed(streams[fd], data)
            else:
                poller.unregister(fd)
                open_fds.remove(fd)
    writer.close()
