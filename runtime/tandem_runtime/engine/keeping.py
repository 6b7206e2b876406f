"""KV that is to stay: what becomes of a held export that is computed for later streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Sequence as Stream
from tandem_runtime.engine.tiered import Tiered


class Keeping:
    """A part of the engine, called from its thread. `find` raises KeyError for unknown streams."""

    def __init__(self, scheduler: Scheduler, tiered: Tiered, find: Callable[[str], Stream]) -> None:
        self._scheduler = scheduler
        self._tiered = tiered
        self._find = find

    def offered(self, request_id: str) -> bool | None:
        """Of an export with `Request.keep`: True once the tiers have been given its pages.

        None: their queue is full, ask again after a while.
        """
        return self._tiered.offered(self._find(request_id)) or None

    def pin(self, request_id: str) -> list[bytes]:
        """Keep the full blocks of an export on the accelerator, for as long as no stream that runs
        needs them. Returns what `unpin` and `pinned_tokens` take."""
        stream = self._find(request_id)
        keys = stream.keys[: stream.computed_tokens // self._scheduler.block_tokens]
        self._scheduler.pool.pin(keys)
        return keys

    def unpin(self, keys: Sequence[bytes]) -> None:
        """As often as `pin`."""
        self._scheduler.pool.unpin(keys)

    def pinned_tokens(self, keys: Sequence[bytes]) -> int:
        """Leading tokens of what was pinned that are there still."""
        return self._scheduler.pool.present(keys) * self._scheduler.block_tokens
