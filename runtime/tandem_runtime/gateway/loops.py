"""Work that is repeated for as long as the process lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def repeat(what: str, work: Callable[[], Awaitable[None]], period_s: float) -> None:
    """Until cancelled. A round that fails is logged, and the next one comes all the same."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed; the next round is in %g s", what, period_s)
        await asyncio.sleep(period_s)
