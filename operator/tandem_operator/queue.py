"""A keyed work queue: each key at most once waiting and once at work, failures backed off.

A key added while it is at work runs again afterwards. Time and jitter are arguments; `KeyedQueue`
itself never sleeps except in `get`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 300.0
SLACK = 64


class KeyedQueue(Generic[K]):
    """The queue. Not thread-safe: one event loop."""

    def __init__(self, monotonic_s: Callable[[], float], jitter: Callable[[], float]) -> None:
        """`jitter` draws a factor around 1 that is applied to every back-off."""
        self._monotonic_s = monotonic_s
        self._jitter = jitter
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._serial = itertools.count()
        self._working: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due or at work; those that only wait for a time do not count."""
        now_s = self._monotonic_s()
        return len(self._working) + sum(when <= now_s for when in self._due.values())

    @property
    def failing(self) -> int:
        """Keys whose last attempt failed."""
        return len(self._failures)

    def add(self, key: K, after_s: float = 0.0) -> None:
        """Run `key` after a while; an earlier appointment stands, a later one is replaced."""
        when_s = self._monotonic_s() + after_s
        if key in self._due and self._due[key] <= when_s:
            return
        self._due[key] = when_s
        if len(self._heap) > 2 * len(self._due) + SLACK:
            # Appointments that were brought forward stay in the heap until their old time comes.
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (when_s, next(self._serial), key))
        self._changed.set()

    async def get(self) -> K:
        """The next key that is due and not at work; it is at work from now on."""
        while True:
            self._changed.clear()
            key, wait_s = self._pop()
            if key is not None:
                return key
            try:
                await asyncio.wait_for(self._changed.wait(), wait_s)
            except TimeoutError:
                continue

    def _pop(self) -> tuple[K | None, float | None]:
        """A key, or None and how long to wait for one."""
        parked: list[tuple[float, int, K]] = []
        now_s, found, wait_s = self._monotonic_s(), None, None
        while self._heap:
            when_s, serial, key = self._heap[0]
            if self._due.get(key) != when_s:
                heapq.heappop(self._heap)
                continue
            if when_s > now_s:
                wait_s = when_s - now_s
                break
            heapq.heappop(self._heap)
            if key in self._working:
                parked.append((when_s, serial, key))
                continue
            found = key
            break
        for entry in parked:
            heapq.heappush(self._heap, entry)
        if found is not None:
            del self._due[found]
            self._working.add(found)
        return found, wait_s

    def done(self, key: K, requeue_after_s: float | None = None) -> None:
        """The key went well."""
        self._working.discard(key)
        self._failures.pop(key, None)
        if requeue_after_s is not None:
            self.add(key, requeue_after_s)
        self._changed.set()

    def failed(self, key: K) -> float:
        """The key failed and runs again after a back-off, which is returned in seconds."""
        self._working.discard(key)
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        wait_s = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(count, 20)) * self._jitter()
        self.add(key, wait_s)
        self._changed.set()
        return wait_s
