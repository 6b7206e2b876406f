"""A line now and then about bytes that are fetched or loaded."""

from __future__ import annotations

import logging
import threading
import time

PERIOD_S = 5.0
log = logging.getLogger(__name__)


class Progress:
    """Counts bytes up to a total; any thread may add."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._began_s = self._said_s = time.monotonic()
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """`nbytes` more are done."""
        with self._lock:
            self._done_bytes += nbytes
            now_s = time.monotonic()
            if now_s - self._said_s < PERIOD_S and self._done_bytes < self._total_bytes:
                return
            self._said_s = now_s
            log.info(
                "%s: %.2f of %.2f GB (%d %%), %.2f GB/s",
                self._what,
                self._done_bytes / 1e9,
                self._total_bytes / 1e9,
                100 * self._done_bytes // max(self._total_bytes, 1),
                self._done_bytes / 1e9 / max(now_s - self._began_s, 1e-3),
            )
