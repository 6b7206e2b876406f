"""Reads a trace file, whichever of the public formats it has; .gz files too.

Told apart by their first line:

| format | line | time |
|---|---|---|
| plain CSV | timestamp_ms,input_tokens,output_tokens[,hash_ids joined by ;] | ms |
| Azure 2023 and 2024 | TIMESTAMP,ContextTokens,GeneratedTokens | date and time |
| BurstGPT | Timestamp,Model,Request tokens,Response tokens,... | s |
| Mooncake JSONL | timestamp, input_length, output_length, hash_ids of 512-token blocks | ms |
| Qwen-Bailian JSONL | the same with chat_id, and 16-token blocks | s |
| rates CSV | window_start_s,requests_per_s,mean_input_tokens,mean_output_tokens | s |

Requests without an answer (0 output tokens: they failed) are left out and counted. Times that tick
in whole seconds or more are spread evenly over the tick, or requests would come in bursts that only
the clock made.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Final

from tandem.traces.formats import FORMATS, Format, Request
from tandem.traces.rates import RATE_COLUMNS, Window, from_rates
from tandem.traces.trace import Trace, TraceError, in_order

_COARSE_MS: Final = 1000


@dataclass
class _Columns:
    """The requests so far."""

    arrival_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    blocks: list[tuple[int, ...]] = field(default_factory=list)
    unanswered: int = 0


def read_trace(path: Path, seed: int = 0, rate_share: float = 1.0) -> Trace:
    """The trace of a file. Raises TraceError.

    Args:
        path: of the file.
        seed: for what the file leaves to chance: arrivals within a coarse clock's tick or a rate.
        rate_share: which share of a rate file's requests to make.
    """
    lines = enumerate(_lines(path), start=1)
    try:
        number, first = next(lines)
    except StopIteration:
        raise TraceError(f"{path} is empty: it holds no request") from None
    header = [name.strip() for name in first.split(",")]
    if header[: len(RATE_COLUMNS)] == list(RATE_COLUMNS):
        windows = list(_rate_windows(path, lines))
        return from_rates(path.name, windows, Random(seed), rate_share)
    chosen = next((f for f in FORMATS if f.matches(first)), None)
    if chosen is None:
        raise TraceError(
            f"{path}, line 1: {first[:80]!r} begins none of the formats that are read: "
            f"{', '.join(f.name for f in FORMATS)}, rates CSV"
        )
    rows = lines if chosen.header else _again((number, first), lines)
    return _assemble(path, chosen, _parsed(path, chosen, header, rows), seed)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file, unpacked. Raises TraceError."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        opener = gzip.open if packed else open
        with opener(path, "rt", encoding="utf-8-sig") as text:
            for line in text:
                if line.strip():
                    yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error


def _again(first: tuple[int, str], rest: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _parsed(
    path: Path, chosen: Format, header: list[str], rows: Iterable[tuple[int, str]]
) -> _Columns:
    parse: Callable[[str], Request] = chosen.parser(header)
    columns = _Columns()
    for number, line in rows:
        try:
            request = parse(line)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise TraceError(
                f"{path}, line {number}: {line[:80]!r} is no request of a {chosen.name} trace: "
                f"{error}"
            ) from error
        if (
            not math.isfinite(request.at_s)
            or request.prompt_tokens < 0
            or request.output_tokens < 0
        ):
            raise TraceError(
                f"{path}, line {number}: times must be finite and token counts at least 0, but the "
                f"line is {line[:80]!r}"
            )
        if not request.output_tokens or not request.prompt_tokens:
            columns.unanswered += 1
            continue
        columns.arrival_s.append(request.at_s)
        columns.prompt_tokens.append(request.prompt_tokens)
        columns.output_tokens.append(request.output_tokens)
        columns.blocks.append(request.blocks)
    if not columns.arrival_s:
        raise TraceError(f"{path} holds no request that was answered")
    return columns


def _assemble(path: Path, chosen: Format, columns: _Columns, seed: int) -> Trace:
    first_s = min(columns.arrival_s)
    arrivals = [at_s - first_s for at_s in columns.arrival_s]
    notes = []
    if columns.unanswered:
        notes.append(f"{columns.unanswered} requests without tokens left out")
    trace = Trace(
        name=path.name,
        arrival_s=arrivals,
        prompt_tokens=columns.prompt_tokens,
        output_tokens=columns.output_tokens,
        blocks=columns.blocks if any(columns.blocks) else None,
        block_tokens=chosen.block_tokens,
        duration_s=max(arrivals),
    )
    tick_s = _tick_s(arrivals)
    if tick_s:
        rng = Random(seed)
        notes.append(f"arrivals spread over the clock's ticks of {tick_s:g} s")
        spread = in_order(trace, lambda at_s: at_s + rng.random() * tick_s)
        return replace(spread, duration_s=trace.duration_s + tick_s, notes=tuple(notes))
    return replace(in_order(trace, lambda at_s: at_s), notes=tuple(notes))


def _tick_s(arrivals: list[float]) -> float:
    """The clock's tick where it is coarse and several requests share one; else 0."""
    ticks = 0
    for at_s in arrivals:
        ms = round(at_s * 1000)
        if abs(ms - at_s * 1000) > 1e-6:
            return 0.0
        ticks = math.gcd(ticks, ms)
        if 0 < ticks < _COARSE_MS:
            return 0.0
    return ticks / 1000 if len(set(arrivals)) < len(arrivals) else 0.0


def _rate_windows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Window]:
    for number, line in lines:
        try:
            start, rate, prompt, output = (float(v) for v in next(csv.reader([line]))[:4])
            if not all(map(math.isfinite, (start, rate, prompt, output))) or rate < 0:
                raise ValueError("numbers must be finite, and rates at least 0")
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: {line[:80]!r} is no rate: {error}") from error
        yield Window(start, rate, prompt, output)
