"""Pages that wait to be stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tandem_runtime.kv.tiers.contract import Page, Tier
from tandem_runtime.kv.tiers.jobs import Job, Jobs


class Backlog:
    """Pages that wait to be stored: one thread puts them, and one takes them."""

    def __init__(self, jobs: Jobs, most_pages: int) -> None:
        self._jobs = jobs
        self._most_pages = most_pages
        self._put = self._taken = 0
        self.woken: Callable[[], None] = lambda: None
        """Called from the thread that takes them once half of the room is free again."""

    @property
    def room_pages(self) -> int:
        """How many more `store` takes now."""
        return self._most_pages - (self._put - self._taken)

    def store(self, tiers: Sequence[Tier], page: Page) -> None:
        """Give a page to these tiers, or tell them that it will not come."""
        if not self.put(partial(_store, tiers, page)):
            self.forget(tiers, [page.key])

    def put(self, job: Job) -> bool:
        """Whether there was room for what is to be done with a page."""
        if self.room_pages <= 0:
            return False
        self._put += 1
        self._jobs.put(partial(self._take, job))
        return True

    def forget(self, tiers: Sequence[Tier], keys: Sequence[bytes]) -> None:
        for tier in tiers if keys else ():
            self._jobs.put(partial(tier.forget, keys))

    def _take(self, job: Job) -> None:
        self._taken += 1
        job()
        if self.room_pages == self._most_pages // 2:
            self.woken()


def _store(tiers: Sequence[Tier], page: Page) -> None:
    for tier in tiers:
        tier.store(page)
