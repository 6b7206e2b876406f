"""Which page is where: an index of pages by prefix key, in arrays of fixed size. Pure.

A Python dict takes 115 to 135 bytes an entry; this takes 36, and what the policy keeps beside it
stays below 64 altogether, so that millions of pages can be remembered, those that have left their
tier among them. Slots are small integers; callers keep their own columns by slot.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tandem_runtime.prefix import KEY_BYTES

NONE: Final = -1
_MANY: Final = 32
"""Keys that are found faster together."""
_GONE: Final = -2
"""A table entry that was taken out: a search goes on behind it."""


class PageIndex:
    """At most `capacity` keys. Open addressing with linear probing, at most half full."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"an index of {capacity} pages holds nothing: give at least 1")
        self.capacity = capacity
        self._mask = (1 << (2 * capacity - 1).bit_length()) - 1
        self._table = array("i", [NONE]) * (self._mask + 1)
        self._keys = bytearray(KEY_BYTES * capacity)
        self._unused = array("i", range(capacity - 1, -1, -1))
        self._gone = 0

    def __len__(self) -> int:
        return self.capacity - len(self._unused)

    @property
    def full(self) -> bool:
        return not self._unused

    @property
    def page_bytes(self) -> float:
        """Memory for each page that fits."""
        columns = len(self._keys) + self._table.itemsize * (len(self._table) + self.capacity)
        return columns / self.capacity

    def find(self, key: bytes) -> int:
        """The key's slot, or NONE."""
        place = self._place(key)
        return NONE if place == NONE else self._table[place]

    def leading(self, keys: Sequence[bytes], held: bytearray) -> int:
        """How many of the first keys are there, in slots whose byte of `held` is not 0."""
        if len(keys) < _MANY:
            slots = map(self.find, keys)
            return next((n for n, s in enumerate(slots) if s == NONE or not held[s]), len(keys))
        found = self._find_all(keys)
        here = (found != NONE) & (np.frombuffer(held, np.uint8)[found] != 0)
        return len(keys) if here.all() else int(here.argmin())

    def _find_all(self, keys: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """The keys' slots, NONE for what is not there."""
        wanted = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        held = np.frombuffer(self._keys, "<u8").reshape(-1, 2)
        table, mask = np.frombuffer(self._table, np.int32), self._mask
        places = (wanted[:, 0] & np.uint64(mask)).astype(np.int64)
        found = np.full(len(wanted), NONE, np.int32)
        left = np.arange(len(wanted))
        while len(left):
            slots = table[places[left]]
            hit = (slots >= 0) & (held[np.maximum(slots, 0)] == wanted[left]).all(axis=1)
            found[left[hit]] = slots[hit]
            left = left[~hit & (slots != NONE)]
            places[left] = (places[left] + 1) & mask
        return found

    def key(self, slot: int) -> bytes:
        """Of a slot in use."""
        return bytes(self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES])

    def add(self, key: bytes) -> int:
        """A slot for a key that is not there; the index is not full."""
        slot = self._unused.pop()
        self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] = key
        self._enter(key, slot)
        return slot

    def remove(self, slot: int) -> None:
        """The slot, which is in use, may be given to another key."""
        place = self._place(self.key(slot))
        self._table[place] = _GONE
        self._unused.append(slot)
        self._gone += 1
        if self._gone > self._mask // 4:
            self._rebuild()

    def _place(self, key: bytes) -> int:
        table, keys, mask = self._table, self._keys, self._mask
        place = int.from_bytes(key[:8], "little") & mask
        while (slot := table[place]) != NONE:
            start = slot * KEY_BYTES
            if slot >= 0 and keys[start : start + KEY_BYTES] == key:
                return place
            place = (place + 1) & mask
        return NONE

    def _enter(self, key: bytes, slot: int) -> None:
        place = int.from_bytes(key[:8], "little") & self._mask
        while self._table[place] >= 0:
            place = (place + 1) & self._mask
        self._gone -= self._table[place] == _GONE
        self._table[place] = slot

    def _rebuild(self) -> None:
        slots = [slot for slot in self._table if slot >= 0]
        self._table = array("i", [NONE]) * (self._mask + 1)
        self._gone = 0
        for slot in slots:
            self._enter(self.key(slot), slot)
