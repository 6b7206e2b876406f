"""Reading container logs in CRI format: TIME STREAM TAG TEXT, tag P for a line that goes on.

The options are those of `kubectl logs`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TAIL_BLOCK_BYTES: Final = 64 * 1024


class LogOptionsError(ValueError):
    """An option of the request that is no number or time."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What part of a log is asked for."""

    follow: bool = False
    previous: bool = False
    timestamps: bool = False
    tail_lines: int | None = None
    limit_bytes: int | None = None
    since: str = ""
    """RFC 3339 in UTC with nanoseconds, as records have it: compares as text."""

    @classmethod
    def from_query(cls, query: dict[str, str], now_s: float) -> LogOptions:
        """From the query of GET /containerLogs/...

        Raises:
            LogOptionsError: with a sentence for the caller.
        """
        since = ""
        if "sinceSeconds" in query:
            since = _stamp(now_s - _number(query, "sinceSeconds"))
        elif "sinceTime" in query:
            try:
                moment = datetime.datetime.fromisoformat(query["sinceTime"])
            except ValueError:
                raise LogOptionsError(f"sinceTime {query['sinceTime']!r} is no time") from None
            since = _stamp(moment.timestamp())
        return cls(
            follow=query.get("follow") == "true",
            previous=query.get("previous") == "true",
            timestamps=query.get("timestamps") == "true",
            tail_lines=_number(query, "tailLines") if "tailLines" in query else None,
            limit_bytes=_number(query, "limitBytes") if "limitBytes" in query else None,
            since=since,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a log."""

    time: str
    stream: str
    partial: bool
    text: bytes

    def render(self, *, timestamps: bool) -> bytes:
        """The record as `kubectl logs` prints it."""
        head = f"{self.time} ".encode() if timestamps else b""
        return head + self.text + (b"" if self.partial else b"\n")


def parse(line: bytes) -> Record | None:
    """The record of a line without its newline; None when it is damaged."""
    fields = line.split(b" ", 3)
    if len(fields) != 4 or fields[2] not in (b"F", b"P"):
        return None
    time, stream, tag, text = fields
    return Record(time.decode(), stream.decode(), tag == b"P", text)


def select(lines: Iterable[bytes], options: LogOptions) -> Iterator[bytes]:
    """Renders the records that are recent enough."""
    for line in lines:
        record = parse(line)
        if record is not None and record.time >= options.since:
            yield record.render(timestamps=options.timestamps)


def tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin, reading from the end in blocks. Records count as lines,
    except that a partial one belongs to the next."""
    with path.open("rb") as file:
        position = file.seek(0, 2)
        if lines == 0:
            return position
        held = b""
        while position > 0:
            size = min(TAIL_BLOCK_BYTES, position)
            position = file.seek(position - size)
            held = file.read(size) + held
            file.seek(position)
            starts = _line_starts(held, at_file_start=position == 0)
            if len(starts) >= lines:
                return position + starts[-lines]
    return 0


def _line_starts(held: bytes, *, at_file_start: bool) -> list[int]:
    """Offsets in `held` at which a whole line of output begins."""
    starts, offset, continues = [], 0, not at_file_start
    for line in held.splitlines(keepends=True):
        if not continues:
            starts.append(offset)
        record = parse(line.rstrip(b"\n"))
        # The first piece of a block may be the rest of a record: then it tells nothing.
        continues = record.partial if record is not None else offset == 0 and not at_file_start
        offset += len(line)
    return starts


def tail_text(path: Path, lines: int, limit_bytes: int) -> str:
    """The end of a log as text, for a termination message."""
    try:
        with path.open("rb") as file:
            file.seek(tail_offset(path, lines))
            rendered = b"".join(select(file.read().split(b"\n"), LogOptions()))
    except FileNotFoundError:
        return ""
    return rendered[-limit_bytes:].decode(errors="replace")


def _stamp(unix_s: float) -> str:
    moment = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def _number(query: dict[str, str], name: str) -> int:
    try:
        return int(query[name])
    except ValueError:
        raise LogOptionsError(f"{name} {query[name]!r} is no whole number") from None
