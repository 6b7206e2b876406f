"""Following a log that is being written, across the shim's setting it aside."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

from tandem.agent.logs import LogOptions, select, tail_offset
from tandem.agent.store import RunDir

POLL_S: Final = 0.2
READ_BYTES: Final = 256 * 1024


async def read_log(run: RunDir, options: LogOptions) -> AsyncIterator[bytes]:
    """The rendered log of a run; with `follow`, until the run has ended and all was read."""
    while not run.log.exists():
        if run.ending() is not None or not options.follow:
            return
        await asyncio.sleep(POLL_S)
    offset = 0 if options.tail_lines is None else tail_offset(run.log, options.tail_lines)
    file = run.log.open("rb")
    try:
        file.seek(offset)
        rest = b""
        while True:
            # Asked before reading: what was written until its end is then read for certain.
            ended = run.ending() is not None
            if data := file.read(READ_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                yield b"".join(select(lines, options))
            elif _was_set_aside(file, run.log):
                file.close()
                file = run.log.open("rb")
            elif ended or not options.follow:
                return
            else:
                await asyncio.sleep(POLL_S)
    finally:
        file.close()


def _was_set_aside(file: BinaryIO, path: Path) -> bool:
    """Whether the path names a newer file by now."""
    try:
        return os.fstat(file.fileno()).st_ino != path.stat().st_ino
    except FileNotFoundError:
        return False
