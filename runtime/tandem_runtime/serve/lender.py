"""Pages of this pod's caches for other pods of its revision (docs/design/peers-tier.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from tandem_runtime.engine.engine import Engine
from tandem_runtime.frontend.errors import ApiError, Forbidden, Unavailable
from tandem_runtime.kv.layout import Payload
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.kv.tiers.peer import TRIP_BYTES, WantedPage, WantedPages
from tandem_runtime.kv.tiers.record import encode, header_of
from tandem_runtime.prefix import KEY_BYTES

AT_ONCE: Final = 2
"""Questions that are answered at the same time; others are told to compute."""
_TIERS_S: Final = 5.0
"""For the pod's own tiers to say whether they have a page."""
_PIECE_BYTES: Final = 1 << 20

Record = tuple[bytes, Payload]
"""A page's header, and its payload."""


class OtherLayout(ApiError):
    """KV of another model or format is of no use to whoever asks."""

    status = HTTPStatus.CONFLICT
    kind = "invalid_request_error"


@dataclass
class LentCounters:
    pages: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    """Questions, by what came of them."""

    def count(self, outcome: str) -> None:
        self.asked[outcome] = self.asked.get(outcome, 0) + 1


class Lender:
    """Args:
    engine: whose caches; its thread is never waited for.
    lends: whether the pod takes part.
    """

    def __init__(self, engine: Engine, *, lends: bool) -> None:
        self.lends = lends
        self.counters = LentCounters()
        self._lending, self._tiers = engine.lending, engine.tiers
        self._layout_hash, self._layout = engine.layout_hash, engine.layout
        self._busy = 0

    async def lend(self, wanted: WantedPages) -> list[Record]:
        """Records of the leading ones of these pages, as many as one answer carries.

        Raises:
            Forbidden: this pod lends nothing.
            OtherLayout: its KV is another model's.
            Unavailable: not now.
        """
        if not self.lends:
            raise Forbidden("This pod gives no pages to others; its fleet has no tier of peers.")
        if wanted.layout != self._layout_hash:
            self.counters.count("layout")
            raise OtherLayout("This pod's KV cache is of another model, or in another form.")
        if self._busy >= AT_ONCE:
            self.counters.count("busy")
            raise Unavailable("This pod gives pages to others already.")
        self._busy += 1
        try:
            records = await self._records(wanted.pages)
        finally:
            self._busy -= 1
        self.counters.pages += len(records)
        self.counters.count("given" if records else "missing")
        return records

    async def _records(self, pages: Sequence[WantedPage]) -> list[Record]:
        found: list[Record] = []
        carried_bytes = 0
        for page in pages:
            record = await self._record(page)
            if record is None:
                break
            found.append(record)
            carried_bytes += memoryview(record[1]).nbytes
            if carried_bytes >= TRIP_BYTES:
                break
        return found

    async def _record(self, wanted: WantedPage) -> Record | None:
        record = await asyncio.to_thread(self._on_accelerator, wanted)
        if record is None and self._tiers is not None:
            page = await self._below(wanted)
            if page is not None:
                record = await asyncio.to_thread(self._packed, page)
        return record

    def _on_accelerator(self, wanted: WantedPage) -> Record | None:
        joined = wanted.blocks
        keys = [joined[n : n + KEY_BYTES] for n in range(0, len(joined), KEY_BYTES)]
        lent = self._lending.read(keys, wanted.tokens)
        if lent is None:
            return None
        page = Page(wanted.key, wanted.parent, wanted.tokens, lent.payload, lent.decoded)
        return self._packed(page)

    def _packed(self, page: Page) -> Record:
        return encode(header_of(page, self._layout_hash)), page.payload

    async def _below(self, wanted: WantedPage) -> Page | None:
        """Of one of the pod's own tiers, in their own time."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Page | None] = loop.create_future()

        def settle(page: Page | None) -> None:
            if not told.done():
                told.set_result(page)

        def tell(page: Page | None) -> None:
            loop.call_soon_threadsafe(settle, page)

        assert self._tiers is not None
        self._tiers.lend(wanted.key, wanted.tokens, tell)
        try:
            return await asyncio.wait_for(told, _TIERS_S)
        except TimeoutError:
            return None


def pieces(records: Sequence[Record]) -> list[memoryview]:
    """What is sent, in order; no piece is so large that others would wait for its copy."""
    found = []
    for header, payload in records:
        found.append(memoryview(header))
        data = memoryview(payload).cast("B")
        found += [data[n : n + _PIECE_BYTES] for n in range(0, len(data), _PIECE_BYTES)]
    return found
