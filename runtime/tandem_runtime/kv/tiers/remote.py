"""The remote tier: pages that all pods of a fleet share, in a store on the network.

A page is one value: the record of the disk tier (record.py), checksums and token ids included. Its
name says format, layout and key, so pods of other models and versions never meet, and two pods that
write one page write the same.

What is in the store, others change too: it evicts, it is wiped, other pods fill it. The policy here
counts what this pod believes to be there; a load finds out. The store bounds itself (maxmemory, or
the time after which it forgets).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final

from tandem_runtime.kv.tiers.breaker import Breaker
from tandem_runtime.kv.tiers.contract import Counters, Page
from tandem_runtime.kv.tiers.policy import NOWHERE, TierPolicy
from tandem_runtime.kv.tiers.record import VERSION, NotARecord, encode, header_of, page_of
from tandem_runtime.kv.tiers.stores import Store, StoreError

log = logging.getLogger(__name__)

REMEMBERED_PAGES: Final = 1 << 15
"""Pages that a pod believes to be there; of others it does not know, and asks."""
_THERE: Final = 0
"""The place of all of them."""


class RemoteTier:
    """Implements `contract.Tier`.

    Args:
        store: where; owned by this tier.
        layout_hash: `KvLayout.hash`; part of every name.
        page_bytes: of a payload.
        page_tokens: of a page.
        remembered_pages: that this pod believes to be in the store.
    """

    name = "remote"

    def __init__(
        self,
        store: Store,
        *,
        layout_hash: bytes,
        page_bytes: int,
        page_tokens: int,
        remembered_pages: int = REMEMBERED_PAGES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = TierPolicy(remembered_pages, remembered_pages=remembered_pages)
        self.counters = Counters()
        self._store = store
        self._layout_hash = layout_hash
        self._page_bytes = page_bytes
        digest = blake2b(layout_hash, digest_size=8, key=b"%d|%d" % (VERSION, page_tokens))
        self._prefix = f"tandem-kv/{digest.hexdigest()}/"
        self._seen: set[bytes] = set()
        """Found by a load, and not yet known to the policy."""
        self._answers = Breaker()
        self._takes = Breaker()
        """It answers, but may be full."""
        self._clock = clock

    # -- the contract -----------------------------------------------------------------------------
    def lookup(self, keys: Sequence[bytes]) -> int:
        return len(keys) if self._answers.allows(self._clock()) else 0

    def use(self, tenant: str, keys: Sequence[bytes], *, goes_on: bool = False) -> list[int]:
        now_s = self._clock()
        if not (self._answers.allows(now_s) and self._takes.allows(now_s)):
            return []
        wanted = []
        for place in self.policy.use(tenant, keys, goes_on=goes_on).store:
            if keys[place] in self._seen:
                self.policy.put(keys[place], _THERE)
            else:
                wanted.append(place)
        self._seen.clear()
        return wanted

    def load(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
        found: list[Page] = []
        for key, ids, value in zip(keys, tokens, self._values(keys), strict=False):
            page = None if value is None else self._checked(key, ids, value)
            if page is None:
                self.counters.evicted_pages += self.policy.drop(key) != NOWHERE
                break
            found.append(page)
            if self.policy.place(key) == NOWHERE:
                self._seen.add(key)
        self.counters.loaded_pages += len(found)
        return found

    def store(self, page: Page) -> bool:
        if not self.policy.has(page.key):
            return False  # forgotten meanwhile
        if self.policy.place(page.key) == NOWHERE and not self._put(page):
            self.policy.drop(page.key)
            return False
        return True

    def forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self.policy.place(key) == NOWHERE:
                self.policy.drop(key)

    def close(self) -> None:
        self._store.close()

    # -- values -----------------------------------------------------------------------------------
    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()

    def _values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As the store has them; none at all where it cannot be asked."""
        if not self._answers.allows(self._clock()):
            return []
        try:
            values = self._store.get([self._name(key) for key in keys])
        except StoreError as error:
            self._failed(self._answers, error)
            return []
        self._succeeded(self._answers)
        return values

    def _put(self, page: Page) -> bool:
        now_s = self._clock()
        if not (self._answers.allows(now_s) and self._takes.allows(now_s)):
            self.counters.fail("unavailable")
            return False
        try:
            header = encode(header_of(page, self._layout_hash))
            self._store.put([(self._name(page.key), b"".join((header, page.payload)))])
        except StoreError as error:
            self._failed(self._takes if error.reason == "full" else self._answers, error)
            return False
        self.policy.put(page.key, _THERE)
        self.counters.stored_pages += 1
        self._succeeded(self._answers)
        self._succeeded(self._takes)
        return True

    def _checked(self, key: bytes, tokens: bytes, value: bytes) -> Page | None:
        """The page of a record that is what it should be."""
        try:
            return page_of(
                value,
                layout_hash=self._layout_hash,
                key=key,
                tokens=tokens,
                page_bytes=self._page_bytes,
            )
        except NotARecord as damage:
            self.counters.fail(str(damage))
            return None

    # -- whether it answers -----------------------------------------------------------------------
    def _failed(self, breaker: Breaker, error: StoreError) -> None:
        self.counters.fail(error.reason)
        self.counters.available = False
        if not breaker.failing:
            log.warning("the remote tier is %s, so prompts do without: %s", error.reason, error)
        breaker.failed(self._clock())

    def _succeeded(self, breaker: Breaker) -> None:
        if breaker.failing:
            log.info("the remote tier answers again")
        breaker.succeeded()
        self.counters.available = not (self._answers.failing or self._takes.failing)
