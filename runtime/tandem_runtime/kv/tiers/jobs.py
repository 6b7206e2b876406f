"""Threads that do the tiers' work, one job at a time, so that each tier has one owner."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Jobs(Protocol):
    """Runs jobs one at a time, in order, but urgent ones first."""

    def put(self, job: Job, *, urgent: bool = False) -> None: ...

    def later(self, delay_s: float, job: Job) -> None:
        """An urgent job, once so many seconds have passed; dropped when it closes before."""

    def close(self) -> None:
        """After the jobs that were put."""


class JobThread:
    """Implements `Jobs` on a thread."""

    def __init__(self, name: str = "tiers") -> None:
        self._changed = threading.Condition()
        self._jobs: list[tuple[int, int, Job]] = []
        self._timed: list[tuple[float, int, Job]] = []
        """By the time at which they are due."""
        self._numbers = itertools.count()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job, *, urgent: bool = False) -> None:
        with self._changed:
            heapq.heappush(self._jobs, (0 if urgent else 1, next(self._numbers), job))
            self._changed.notify()

    def later(self, delay_s: float, job: Job) -> None:
        with self._changed:
            due_s = time.monotonic() + delay_s
            heapq.heappush(self._timed, (due_s, next(self._numbers), job))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                log.exception("a job of the cache tiers failed")

    def _next(self) -> Job | None:
        """Waits for it; None when there is none and will be none."""
        with self._changed:
            while True:
                left_s = self._timed[0][0] - time.monotonic() if self._timed else None
                if left_s is not None and left_s <= 0:
                    return heapq.heappop(self._timed)[2]
                if self._jobs:
                    return heapq.heappop(self._jobs)[2]
                if self._closing:
                    return None
                self._changed.wait(left_s)
