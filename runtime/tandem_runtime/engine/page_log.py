"""Which pages of prefixes a pod holds, told as changes in order.

A page on the accelerator is named by the prefix key of its last block; in tiers below by its own
key, which is another one. Readers remember how far they have read; who
was away for too long, or read another process's log, gets all pages instead of the changes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from itertools import islice
from typing import Final

from tandem_runtime.page_events import PageEvents

_MOST_CHANGES: Final = 16_384


class PageLog:
    """The engine's thread writes, and that of the cache tiers, each keys of its own; others read.

    Args:
        most_changes: that are remembered.
    """

    def __init__(self, most_changes: int = _MOST_CHANGES) -> None:
        self.id = os.urandom(8).hex()
        """Of this log: a restarted pod's is another one."""
        self._lock = threading.Lock()
        self._held: set[bytes] = set()
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=most_changes)
        """Key, and whether it came or went; the last one has the number `seq`."""
        self.seq = 0

    def gained(self, key: bytes) -> None:
        """The page can be used; told once, however often this is called."""
        if key not in self._held:
            with self._lock:
                self._held.add(key)
                self._change(key, held=True)

    def lost(self, key: bytes) -> None:
        """Any block's key: those that name no page are not told."""
        if key in self._held:
            with self._lock:
                self._held.discard(key)
                self._change(key, held=False)

    def _change(self, key: bytes, *, held: bool) -> None:
        self._changes.append((key, held))
        self.seq += 1

    def since(self, log: str, seq: int) -> PageEvents:
        """What changed after change number `seq` of log `log`, or all pages if that is unknown."""
        with self._lock:
            missed = self.seq - seq
            if log != self.id or not 0 <= missed <= len(self._changes):
                return PageEvents(self.id, self.seq, snapshot=True, gained=b"".join(self._held))
            last = dict(islice(self._changes, len(self._changes) - missed, None))
            now = self.seq
        gained = b"".join(key for key, held in last.items() if held)
        lost = b"".join(key for key, held in last.items() if not held)
        return PageEvents(self.id, now, gained=gained, lost=lost)
