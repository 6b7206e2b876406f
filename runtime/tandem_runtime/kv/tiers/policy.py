"""What one tier keeps: admission, eviction, quotas, floors and pins. Pure: no clock, no chance.

Time is counted in prompts. After each prompt, `use` says which of its pages the tier should store
and which it should give up: the pages least worth keeping go first (reuse.py), new ones among them,
so a scan passes through without displacing what is used again. The same calls in the same order
give the same decisions.

Invariants: never more than `capacity_pages`; a pinned page stays; nobody's pages shrink below his
floor for others; nobody has more than his quota.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from zlib import crc32

from tandem_runtime.kv.tiers.index import NONE, PageIndex
from tandem_runtime.kv.tiers.reuse import CLASSES, REUSED, Reuse, age_bucket, page_class

_GROUPS: Final = 64
"""Tenants without a share of their own are told apart this far, however many names come."""
NOWHERE: Final = (1 << 64) - 1
"""The place of a page that is not stored, or not yet."""
_LISTS: Final = CLASSES + 1
_REMEMBERED: Final = 4
"""Pages remembered after their eviction, in capacities."""


@dataclass(frozen=True)
class Share:
    """A tenant's part of a tier, in pages."""

    floor_pages: int = 0
    """Kept for him against others."""
    quota_pages: int | None = None
    """None: no limit."""


@dataclass(frozen=True)
class Decision:
    store: tuple[int, ...] = ()
    """Which of the prompt's pages to store, by their place in it."""
    evict: tuple[bytes, ...] = ()
    """Keys of pages to give up, before anything is stored."""
    evicted_places: tuple[int, ...] = ()
    """Where those of them were that had been stored."""


@dataclass
class _Tenant:
    share: Share
    pages: int = 0
    pinned: int = 0
    """Of them."""
    ghosts: int = 0
    """Evicted pages that are remembered."""

    @cached_property
    def reuse(self) -> Reuse:
        """Made when he first asks: most of the groups are nobody."""
        return Reuse()


class TierPolicy:
    """Decides for one tier of pages of equal size.

    Args:
        capacity_pages: what the tier holds.
        shares: of the tenants that have one of their own.
        default_quota_pages: of each other tenant. They are told apart in groups that share it.
        remembered_pages: evicted ones that go on being counted; None: four capacities.
    """

    def __init__(
        self,
        capacity_pages: int,
        *,
        shares: Mapping[str, Share] | None = None,
        default_quota_pages: int | None = None,
        remembered_pages: int | None = None,
    ) -> None:
        if remembered_pages is None:
            remembered_pages = _REMEMBERED * capacity_pages
        # A prompt's pages are all in the index before any is evicted.
        remembered_pages = max(remembered_pages, capacity_pages)
        shares = dict(shares or {})
        floors = sum(share.floor_pages for share in shares.values())
        if floors > capacity_pages:
            raise ValueError(
                f"the tenants' floors are {floors} pages together, but the tier holds "
                f"{capacity_pages}: lower them, or make the tier larger"
            )
        self.capacity_pages = capacity_pages
        self.resident_pages = 0
        self._numbers = {name: number for number, name in enumerate(shares)}
        self._tenants = [_Tenant(share) for share in shares.values()]
        default = Share(quota_pages=default_quota_pages)
        self._tenants += [_Tenant(default) for _ in range(_GROUPS)]
        self._tenants.append(_Tenant(Share()))  # whose pages are nobody's yet
        self._index = index = PageIndex(capacity_pages + remembered_pages)
        count = index.capacity
        self._class = array("B", bytes(count))
        self._tenant = array("H", bytes(2 * count))
        self._last = array("I", bytes(4 * count))
        self._resident = bytearray(count)
        self._pins = array("H", bytes(2 * count))
        self._place = array("Q", b"\xff" * (8 * count))
        lists = len(self._tenants) * _LISTS
        self._next = array("i", range(count + lists))
        self._previous = array("i", range(count + lists))
        """Circles, oldest first: each tenant's, one for each class and one of the evicted pages.
        The entries behind the slots are their heads. Pinned pages are in none."""
        self._now = 0

    @property
    def page_bytes(self) -> float:
        """Memory of the index for each page that it can remember."""
        columns = (
            self._class,
            self._tenant,
            self._last,
            self._pins,
            self._place,
            self._next,
            self._previous,
        )
        size = sum(column.itemsize for column in columns) + 1
        return self._index.page_bytes + size

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading pages the tier should have. Changes nothing."""
        return self._index.leading(keys, self._resident)

    def has(self, key: bytes) -> bool:
        slot = self._index.find(key)
        return slot != NONE and bool(self._resident[slot])

    @property
    def pinned_pages(self) -> int:
        return sum(tenant.pinned for tenant in self._tenants)

    @property
    def named(self) -> tuple[str, ...]:
        """The tenants that have a share of their own."""
        return tuple(self._numbers)

    def pages_of(self, tenant: str) -> int:
        """Of a tenant with a share of his own."""
        return self._tenants[self._numbers[tenant]].pages

    # -- a prompt ---------------------------------------------------------------------------------
    def use(self, tenant: str, keys: Sequence[bytes], *, goes_on: bool = False) -> Decision:
        """A prompt of these pages was served, its first page first; or with `goes_on` a stream has
        filled them behind its prompt, which takes no time.

        The caller gives up what `evict` says, then stores what `store` says; what it cannot store
        it tells by `drop`.
        """
        keys = keys[: self.capacity_pages]
        return self._use(self._number(tenant), keys, pin=False, goes_on=goes_on)

    def keep(self, tenant: str, keys: Sequence[bytes]) -> Decision | None:
        """The same, and pin all of these pages, whatever they are worth, until `unpin`.

        None, and nothing changes, where pins, others' floors or the tenant's quota leave no room.
        """
        number = self._number(tenant)
        share = self._tenants[number].share
        slots = [self._index.find(key) for key in keys]
        new = sum(slot == NONE or not self._pins[slot] for slot in slots)
        quota = self.capacity_pages if share.quota_pages is None else share.quota_pages
        if self._tenants[number].pinned + new > quota or new > self._unpinned_room(number):
            return None
        return self._use(number, keys, pin=True)

    def _unpinned_room(self, number: int) -> int:
        """Pages that a tenant may have pinned beside what is, others' floors kept."""
        others = [t for n, t in enumerate(self._tenants) if n != number]
        kept = sum(max(t.pinned, t.share.floor_pages) for t in others)
        return self.capacity_pages - kept - self._tenants[number].pinned

    def _use(
        self, number: int, keys: Sequence[bytes], *, pin: bool, goes_on: bool = False
    ) -> Decision:
        if not keys:
            return Decision()
        known_prefix = goes_on or self._index.find(keys[0]) != NONE
        fresh: dict[bytes, int] = {}
        # The end first: it is the first to be evicted. A prefix is of use without its end.
        for place in range(len(keys) - 1, -1, -1):
            slot = self._index.find(keys[place])
            new_class = page_class(
                used_before=slot != NONE, known_prefix=known_prefix, prompt_pages=len(keys)
            )
            if slot == NONE:
                slot = self._remember(keys[place])
            else:
                self._end(slot, reused=True)
                if not self._resident[slot]:
                    self._tenants[self._tenant[slot]].ghosts -= 1
            if not self._resident[slot]:
                fresh[keys[place]] = place
            self._begin(slot, number, new_class)
            if pin:
                self._pin(slot)
        self._now += not goes_on
        evicted = self._keep_quota(number) + self._make_room(number)
        self._tenants[number].reuse.served(self._now)
        store = fresh.keys() - {key for key, _ in evicted}
        return Decision(
            tuple(sorted(fresh[key] for key in store)),
            tuple(key for key, _ in evicted if key not in fresh),
            tuple(place for _, place in evicted if place != NOWHERE),
        )

    # -- where it is ------------------------------------------------------------------------------
    def place(self, key: bytes) -> int:
        """Where the tier put the page, or NOWHERE."""
        slot = self._index.find(key)
        return NOWHERE if slot == NONE else self._place[slot]

    def put(self, key: bytes, place: int) -> None:
        """A page that `use` or `adopt` let in has been stored there; the number is the tier's."""
        self._place[self._index.find(key)] = place

    def adopt(self, key: bytes, place: int) -> bool:
        """Take in a page that the tier found when it was opened; False if it is here, or full."""
        if self.resident_pages >= self.capacity_pages or self._index.find(key) != NONE:
            return False
        slot = self._index.add(key)
        # Whose it is, is in no record: the first use says it.
        self._begin(slot, len(self._tenants) - 1, REUSED)
        self._place[slot] = place
        return True

    def drop(self, key: bytes) -> int:
        """The tier does not have this page: it could not be stored, or is damaged. Its place."""
        slot = self._index.find(key)
        if slot == NONE or not self._resident[slot]:
            return NOWHERE
        if self._pins[slot]:
            self._pins[slot] = 0
            self._tenants[self._tenant[slot]].pinned -= 1
        return self._to_ghost(slot)

    def pin(self, keys: Sequence[bytes]) -> bool:
        """Keep these pages, all of which are here, until as many calls of `unpin`; False if not."""
        slots = [self._index.find(key) for key in keys]
        if not all(slot != NONE and self._resident[slot] for slot in slots):
            return False
        for slot in slots:
            self._pin(slot)
        return True

    def _pin(self, slot: int) -> None:
        if not self._pins[slot]:
            self._unlink(slot)
            self._tenants[self._tenant[slot]].pinned += 1
        self._pins[slot] += 1

    def unpin(self, keys: Sequence[bytes]) -> None:
        """The inverse; pages that were dropped meanwhile are passed over."""
        for key in reversed(keys):
            slot = self._index.find(key)
            if slot == NONE or not self._pins[slot]:
                continue
            self._pins[slot] -= 1
            if not self._pins[slot]:
                self._tenants[self._tenant[slot]].pinned -= 1
                self._link(slot, self._list_of(slot))

    # -- giving way -------------------------------------------------------------------------------
    def _make_room(self, newcomer: int) -> list[tuple[bytes, int]]:
        """Evict what is too much: of whoever is above his floor, else of the newcomer."""
        evicted = self._evict_least(range(len(self._tenants)), self._excess)
        if self._excess():  # everybody else is at his floor, or pinned
            evicted += self._evict_least([newcomer], self._excess, floors=False)
        return evicted

    def _excess(self) -> int:
        return self.resident_pages - self.capacity_pages

    def _keep_quota(self, number: int) -> list[tuple[bytes, int]]:
        tenant = self._tenants[number]
        quota = tenant.share.quota_pages
        if quota is None:
            return []
        return self._evict_least([number], lambda: tenant.pages - quota, floors=False)

    def _evict_least(
        self, numbers: Iterable[int], excess: Callable[[], int], *, floors: bool = True
    ) -> list[tuple[bytes, int]]:
        """Evict these tenants' pages, those least worth first, until there is no excess."""
        evicted: list[tuple[bytes, int]] = []
        if excess() <= 0:
            return evicted
        heap = [
            self._candidate(number * _LISTS + page_class)
            for number in numbers
            if self._tenants[number].pages
            for page_class in range(CLASSES)
            if self._oldest(number * _LISTS + page_class) != NONE
        ]
        heapq.heapify(heap)
        while heap and excess() > 0:
            _, _, which = heap[0]
            tenant = self._tenants[which // _LISTS]
            slot = self._oldest(which)
            if slot == NONE or (floors and tenant.pages <= tenant.share.floor_pages):
                heapq.heappop(heap)
                continue
            evicted.append((self._index.key(slot), self._to_ghost(slot)))
            if self._oldest(which) != NONE:
                heapq.heapreplace(heap, self._candidate(which))
        return evicted

    def _candidate(self, which: int) -> tuple[float, int, int]:
        """What the oldest page of a list is worth, when it was last used, and the list."""
        last = self._last[self._oldest(which)]
        tenant, page_class = divmod(which, _LISTS)
        age = age_bucket(self._now - last)
        return self._tenants[tenant].reuse.worth[page_class][age], last, which

    def _number(self, tenant: str) -> int:
        number = self._numbers.get(tenant)
        return len(self._numbers) + crc32(tenant.encode()) % _GROUPS if number is None else number

    # -- slots ------------------------------------------------------------------------------------
    def _remember(self, key: bytes) -> int:
        if self._index.full:
            # Of whom most are remembered: a scan makes nobody else forgotten.
            number = max(range(len(self._tenants)), key=lambda n: self._tenants[n].ghosts)
            oldest = self._oldest(number * _LISTS + CLASSES)
            self._tenants[number].ghosts -= 1
            self._end(oldest, reused=False)
            self._unlink(oldest)
            self._index.remove(oldest)
        return self._index.add(key)

    def _begin(self, slot: int, number: int, page_class: int) -> None:
        """A page is used now, and resident."""
        if not self._resident[slot]:
            self._resident[slot] = 1
            self.resident_pages += 1
        else:
            self._tenants[self._tenant[slot]].pages -= 1
            self._tenants[self._tenant[slot]].pinned -= bool(self._pins[slot])
        self._tenants[number].pages += 1
        self._tenants[number].pinned += bool(self._pins[slot])
        self._tenant[slot] = number
        self._class[slot], self._last[slot] = page_class, self._now
        self._tenants[self._tenant[slot]].reuse.used(page_class, self._now)
        if not self._pins[slot]:
            self._link(slot, self._list_of(slot))

    def _end(self, slot: int, *, reused: bool) -> None:
        """A page's time since its last use is over."""
        of_tenant = self._tenants[self._tenant[slot]].reuse
        of_tenant.ended(self._class[slot], self._last[slot], self._now, reused=reused)

    def _to_ghost(self, slot: int) -> int:
        """Evict a page; where it was."""
        self._resident[slot] = 0
        self.resident_pages -= 1
        number = self._tenant[slot]
        self._tenants[number].pages -= 1
        self._tenants[number].ghosts += 1
        self._link(slot, number * _LISTS + CLASSES)
        place, self._place[slot] = self._place[slot], NOWHERE
        return place

    # -- lists ------------------------------------------------------------------------------------
    def _list_of(self, slot: int) -> int:
        return self._tenant[slot] * _LISTS + self._class[slot]

    def _head(self, which: int) -> int:
        return self._index.capacity + which

    def _oldest(self, which: int) -> int:
        head = self._head(which)
        slot = self._next[head]
        return NONE if slot == head else slot

    def _link(self, slot: int, which: int) -> None:
        """To the young end of a list, out of the one it is in."""
        self._unlink(slot)
        head = self._head(which)
        youngest = self._previous[head]
        self._next[youngest] = self._previous[head] = slot
        self._previous[slot], self._next[slot] = youngest, head

    def _unlink(self, slot: int) -> None:
        before, behind = self._previous[slot], self._next[slot]
        self._next[before], self._previous[behind] = behind, before
        self._next[slot] = self._previous[slot] = slot
