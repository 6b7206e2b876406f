"""The memory tier: pages as they came from the device, pinned where there is a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from tandem_runtime.kv.tiers.contract import Page, Told
from tandem_runtime.kv.tiers.policy import NOWHERE
from tandem_runtime.kv.tiers.resident import ResidentTier
from tandem_runtime.kv.tiers.tenants import NOBODY, TenantParts


class HostTier(ResidentTier):
    """Implements `contract.Tier`. Keeps the payloads that it is given, without a copy.

    Raises:
        ValueError: the capacity, or a tenant's part of it, is less than a page.
    """

    name = "memory"

    def __init__(
        self, capacity_bytes: int, *, page_bytes: int, tenants: TenantParts = NOBODY
    ) -> None:
        pages = capacity_bytes // page_bytes
        if pages < 1:
            raise ValueError(
                f"a memory tier of {capacity_bytes} bytes holds no page of {page_bytes} bytes: "
                "make it larger"
            )
        super().__init__(tenants.policy(pages))
        self._pages: list[Page | None] = [None] * pages
        self._free = list(range(pages - 1, -1, -1))

    def tell(self, told: Told) -> None:
        self._told = told  # it is empty when it is opened

    def _load(self, key: bytes, tokens: bytes) -> Page | None:
        place = self.policy.place(key)
        held = self._pages[place] if place != NOWHERE else None
        if held is None:
            return None
        if held.tokens != tokens:
            self.counters.fail("collision")
            return None
        self.counters.loaded_pages += 1
        return held

    def store(self, page: Page) -> bool:
        if not self.policy.has(page.key):
            return False  # evicted meanwhile
        if self.policy.place(page.key) == NOWHERE:
            place = self._free.pop()
            self._pages[place] = page
            self.policy.put(page.key, place)
            self.counters.stored_pages += 1
            self._told(page.key, True)
        return True

    def forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self.policy.place(key) == NOWHERE:
                self.policy.drop(key)

    def close(self) -> None:
        self._pages.clear()

    def _left(self, place: int) -> None:
        self._pages[place] = None
        self._free.append(place)
