"""Which pods hold which pages of prefixes, as the pods say. Pure.

A page is 256 tokens; on an accelerator and below it has different names. What pods say comes a
moment late, so prompts that were just sent somewhere count as held there for a while.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.gateway.prompt_keys import PromptKeys
from tandem_runtime.kv.tiers.index import NONE, PageIndex
from tandem_runtime.page_events import PageEvents
from tandem_runtime.prefix import KEY_BYTES

EXPECTED_S: Final = 30.0
"""How long a page that a pod was asked to compute is taken for held without its word."""
MOST_EXPECTED: Final = 8192
"""Of one pod."""
MOST_PAGES: Final = 1 << 20
"""Of one pod; further ones are not remembered."""
_LEAST_PAGES: Final = 64


class PodPages:
    """The pages of one pod: 48 bytes each at most, apart from the first few."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.seq = 0
        self.tiers_below = False
        self.peer_percent = 0
        self._index = PageIndex(_LEAST_PAGES)
        self._expected: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def page_bytes(self) -> float:
        """Memory for each page that is held; what is expected is not counted."""
        return self._index.page_bytes * self._index.capacity / max(1, len(self._index))

    def apply(self, events: PageEvents) -> None:
        """Of this log, in order."""
        if events.snapshot:
            self._index = PageIndex(_LEAST_PAGES)
        for key in _keys(events.lost):
            slot = self._index.find(key)
            if slot != NONE:
                self._index.remove(slot)
        for key in _keys(events.gained):
            self._expected.pop(key, None)
            if self._index.find(key) == NONE and len(self._index) < MOST_PAGES:
                self._grow()
                self._index.add(key)
        self.seq, self.tiers_below = events.seq, events.tiers_below
        self.peer_percent = events.peer_percent

    def expect(self, keys: Sequence[bytes], now_s: float) -> None:
        """The pod was sent a prompt with these pages."""
        for key in keys:
            self._expected[key] = now_s + EXPECTED_S
            self._expected.move_to_end(key)
        while len(self._expected) > MOST_EXPECTED:
            self._expected.popitem(last=False)

    def held(self, keys: PromptKeys, now_s: float) -> int:
        """How many of a prompt's leading pages."""
        for n, key in enumerate(keys.pages):
            if not self._has(keys, n) and self._expected.get(key, now_s) <= now_s:
                return n
        return len(keys.pages)

    def told(self, keys: PromptKeys) -> int:
        """The same without what is only expected."""
        pages = len(keys.pages)
        return next((n for n in range(pages) if not self._has(keys, n)), pages)

    def _has(self, keys: PromptKeys, page: int) -> bool:
        """On the accelerator or below."""
        names = (keys.pages[page], *keys.below[page : page + 1])
        return any(self._index.find(name) != NONE for name in names)

    def _grow(self) -> None:
        """In steps of alternately 3/2 and 4/3: the index's table is a power of two, which a
        capacity of 3 x 2^n fills best."""
        old = self._index
        if not old.full:
            return
        power = 1 << (old.capacity.bit_length() - 1)
        self._index = PageIndex(power * 3 // 2 if old.capacity == power else 2 * power)
        for slot in range(old.capacity):
            self._index.add(old.key(slot))


class PagesHeld:
    """By pod uid: those of the pods that say what they hold."""

    def __init__(self) -> None:
        self._pods: dict[str, PodPages] = {}

    def position(self, uid: str) -> tuple[str, int]:
        """Of the pod's log: which, and how far it is read."""
        pages = self._pods.get(uid)
        return ("", 0) if pages is None else (pages.log, pages.seq)

    def apply(self, uid: str, events: PageEvents) -> None:
        """What the pod said when it was asked for what came after `position`."""
        pages = self._pods.get(uid)
        if pages is None or pages.log != events.log:
            # Of a restarted pod nothing is left, nor of what it was sent before.
            pages = self._pods[uid] = PodPages(events.log)
        pages.apply(events)

    def drop(self, uid: str) -> None:
        """The pod is gone, or does not say what it holds."""
        self._pods.pop(uid, None)

    def expect(self, uid: str, keys: PromptKeys, now_s: float) -> None:
        """The pod was sent a prompt with these keys."""
        if uid in self._pods:
            self._pods[uid].expect(keys.pages, now_s)

    def told(self, keys: PromptKeys) -> dict[str, int]:
        """How many of a prompt's leading pages pods have said that they hold, by uid."""
        return {uid: pages.told(keys) for uid, pages in self._pods.items()}

    def peer_percents(self) -> dict[str, int]:
        """What a page from another pod costs those that take some, of what computing it does."""
        return {uid: pages.peer_percent for uid, pages in self._pods.items() if pages.peer_percent}

    def correct(self, guess: dict[str, int], keys: PromptKeys, now_s: float) -> dict[str, int]:
        """Tokens of a prompt that pods hold, by uid.

        Args:
            guess: the same, from what they were sent. It stands where a pod says nothing, and adds
                to what others say: less than a page, which is not told, or what may be in their
                tiers below the accelerator.
            keys: of the prompt.
            now_s: for what is only expected.
        """
        held = dict(guess)
        for uid, pages in self._pods.items():
            told = pages.held(keys, now_s) * KV_PAGE_TOKENS
            most = keys.tokens
            if not pages.tiers_below:
                most = min(most, told + KV_PAGE_TOKENS - keys.block_tokens)
            held[uid] = max(told, min(guess.get(uid, 0), most))
        return held

    @property
    def pages(self) -> int:
        """Of all pods."""
        return sum(map(len, self._pods.values()))


def _keys(joined: bytes) -> Iterator[bytes]:
    for start in range(0, len(joined), KEY_BYTES):
        yield joined[start : start + KEY_BYTES]
