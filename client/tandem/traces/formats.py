"""The lines of public trace formats."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

_SUBMICROSECONDS: Final = re.compile(r"(\.\d{6})\d+")


@dataclass(frozen=True)
class Request:
    """One line."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Format:
    """How a trace's lines are recognised and read."""

    name: str
    header: bool
    """Whether the first line names columns."""
    block_tokens: int
    matches: Callable[[str], bool]
    """By the first line."""
    parser: Callable[[list[str]], Callable[[str], Request]]
    """From the header's columns to a parser of lines, which raises ValueError or KeyError."""


def _has_columns(*names: str) -> Callable[[str], bool]:
    def matches(line: str) -> bool:
        columns = [column.strip() for column in line.split(",")]
        return all(name in columns for name in names)

    return matches


def _plain(header: list[str]) -> Callable[[str], Request]:
    hashed = "hash_ids" in header

    def parse(line: str) -> Request:
        fields = line.split(",")
        blocks: tuple[int, ...] = ()
        if hashed and len(fields) > 3 and fields[3]:
            blocks = tuple(int(block) for block in fields[3].split(";"))
        return Request(float(fields[0]) / 1e3, int(fields[1]), int(fields[2]), blocks)

    return parse


def _azure(header: list[str]) -> Callable[[str], Request]:
    def parse(line: str) -> Request:
        time, prompt, output = line.split(",")[:3]
        # Seven digits of a second, more than datetime reads.
        moment = datetime.fromisoformat(_SUBMICROSECONDS.sub(r"\1", time.strip()))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return Request(moment.timestamp(), int(prompt), int(output))

    return parse


def _burstgpt(header: list[str]) -> Callable[[str], Request]:
    time, prompt, output = (
        header.index(name) for name in ("Timestamp", "Request tokens", "Response tokens")
    )

    def parse(line: str) -> Request:
        fields = next(csv.reader([line]))
        return Request(float(fields[time]), int(fields[prompt]), int(fields[output]))

    return parse


def _json_lines(tick_s: float) -> Callable[[list[str]], Callable[[str], Request]]:
    def parse(line: str) -> Request:
        values: dict[str, Any] = json.loads(line)
        return Request(
            float(values["timestamp"]) * tick_s,
            int(values["input_length"]),
            int(values["output_length"]),
            tuple(int(block) for block in values.get("hash_ids") or ()),
        )

    return lambda header: parse


def _is_json(line: str, *, chat: bool) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and "input_length" in values and ("chat_id" in values) is chat


FORMATS: Final = (
    Format("plain CSV", True, 512,
           _has_columns("timestamp_ms", "input_tokens", "output_tokens"), _plain),
    Format("Azure", True, 0,
           _has_columns("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure),
    Format("BurstGPT", True, 0,
           _has_columns("Timestamp", "Request tokens", "Response tokens"), _burstgpt),
    Format("Qwen-Bailian", False, 16,
           lambda line: _is_json(line, chat=True), _json_lines(1.0)),
    Format("Mooncake", False, 512,
           lambda line: _is_json(line, chat=False), _json_lines(1e-3)),
)  # fmt: skip
