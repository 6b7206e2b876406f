"""Reads an export's pages out of the cache as its chunks are computed, in the engine's thread.

Pages are read right after the step that completed them: a command from the event loop would wait
for the next step, which may be another prompt's long chunk. How far it reads ahead of what was sent
is bounded for each stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Span, StepOutput
from tandem_runtime.kv.handoff.pages import whole_pages


@dataclass(frozen=True)
class Page:
    """Tokens and their canonical KV, copied out of the cache."""

    span: Span
    payload: memoryview


Deliver = Callable[[list[Page]], None]


@dataclass
class _Reading:
    known_tokens: int
    allowed_tokens: int
    deliver: Deliver
    computed_tokens: int = 0
    read_tokens: int = 0


class PageReader:
    """All methods run in the engine's thread; pages are delivered on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, page_tokens: int) -> None:
        self._loop = loop
        self._page_tokens = page_tokens
        self._readings: dict[str, _Reading] = {}

    def begin(
        self, request_id: str, known_tokens: int, allowed_tokens: int, deliver: Deliver
    ) -> None:
        self._readings[request_id] = _Reading(known_tokens, allowed_tokens, deliver)

    def end(self, request_id: str) -> None:
        self._readings.pop(request_id, None)

    def after_step(self, engine: Engine, output: StepOutput) -> None:
        for stream in output.streams:
            reading = self._readings.get(stream.request_id)
            if stream.finish_reason == "abort":
                self.end(stream.request_id)  # its blocks are gone
            elif reading is not None and stream.computed is not None:
                reading.computed_tokens = stream.computed.end
                self._read(engine, stream.request_id, reading)

    def allow(self, engine: Engine, request_id: str, allowed_tokens: int) -> None:
        """Read as far as this."""
        reading = self._readings.get(request_id)
        if reading is not None:
            reading.allowed_tokens = max(reading.allowed_tokens, allowed_tokens)
            self._read(engine, request_id, reading)

    def restart(self, engine: Engine, request_id: str, start_token: int) -> None:
        """Read again from `start_token`: the receiver holds what comes before it."""
        reading = self._readings.get(request_id)
        if reading is not None:
            reading.read_tokens = start_token
            reading.allowed_tokens = max(reading.allowed_tokens, start_token + self._page_tokens)
            self._read(engine, request_id, reading)

    def _read(self, engine: Engine, request_id: str, reading: _Reading) -> None:
        end = min(reading.computed_tokens, reading.allowed_tokens)
        pages = []
        for span in whole_pages(reading.read_tokens, end, reading.known_tokens, self._page_tokens):
            payload = engine.read_kv(request_id, span.start, span.end)
            pages.append(Page(span, memoryview(payload).cast("B")))
            reading.read_tokens = span.end
        if pages:
            self._loop.call_soon_threadsafe(reading.deliver, pages)
