"""10,000 contexts of 4,096 tokens in a pod: its book of contexts, their pages pinned in a tier."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from typing import Final

from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.frontend.contexts import MOST, Book, Owner
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.kept import Keep, KeptPages
from tandem_runtime.prefix import KEY_BYTES, block_keys
from tandem_runtime.protocol import Context

from benchmarks.context_scale.timing import Times, timed, times_of

CONTEXTS: Final = MOST
PAGES: Final = 16
"""Of each context."""
_CHANGED: Final = 200
"""Contexts that are made, looked up and expire while there are 10,000."""
_TRACED: Final = 1000
"""Whose memory is counted."""
_TENANTS: Final = 50

_IDS: Final = array("I", range(PAGES * KV_PAGE_TOKENS))


class _Pod:
    """One context is made in each second, and lives for so many seconds as there are contexts."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._book = Book(now_unix_s=lambda: self.now_s, monotonic_s=lambda: self.now_s)
        self.tier = HostTier((CONTEXTS + 1) * PAGES, page_bytes=1)
        self._kept = KeptPages()
        self._tokens = bytes(4 * KV_PAGE_TOKENS)

    def create(self, number: int, keys: list[bytes]) -> None:
        context = Context(
            id=f"ctx-{number}",
            model="m",
            fleet="f",
            tenant=f"tenant {number % _TENANTS}",
            prompt="a document",
            created_unix_s=self.now_s,
            expires_unix_s=self.now_s + CONTEXTS,
        )
        self._book.check_room(context)
        self._book.take(context)
        keep = Keep(context.id, self.tier.name)
        for page in self._kept.use(self.tier, context.tenant, keys, keep):
            self.tier.store(Page(keys[page], bytes(KEY_BYTES), self._tokens, b""))

    def find(self, number: int, keys: list[bytes]) -> None:
        """As for a request that names it."""
        context = self._book.find(f"ctx-{number}", Owner(f"tenant {number % _TENANTS}", ""))
        if context is None or self.tier.lookup(keys) != PAGES:
            raise RuntimeError(f"context {number} is not kept")

    def expire(self) -> None:
        for context in self._book.prune():
            self._kept.drop(context.id)


def _keys(number: int) -> list[bytes]:
    return block_keys(number.to_bytes(32, "little"), _IDS, KV_PAGE_TOKENS)


def measure() -> tuple[dict[str, Times], dict[str, float]]:
    """Times of one context among 10,000, and bytes for each."""
    keys = [_keys(number) for number in range(CONTEXTS)]
    pod = _Pod()
    for number in range(CONTEXTS):
        if number == CONTEXTS - _TRACED:  # tracing is slow
            tracemalloc.start()
        pod.now_s = number
        pod.create(number, keys[number])
    traced_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    chance = random.Random(4)
    spent: dict[str, list[float]] = {"create": [], "look up": [], "expire": []}
    for number in range(CONTEXTS, CONTEXTS + _CHANGED):
        pod.now_s = number
        spent["expire"] += timed(pod.expire)
        new, known = _keys(number), chance.randrange(number - CONTEXTS + 1, CONTEXTS)
        spent["create"] += timed(lambda: pod.create(number, new))  # noqa: B023 - called at once
        spent["look up"] += timed(lambda: pod.find(known, keys[known]))  # noqa: B023
    policy = pod.tier.policy
    if policy.pinned_pages != CONTEXTS * PAGES:
        raise RuntimeError(f"{policy.pinned_pages} pages are kept, not {CONTEXTS * PAGES}")
    memory = {
        "index_mb": round(policy.page_bytes * policy.capacity_pages / 1e6, 2),
        "bytes_a_context_beside_index_and_keys": round(traced_bytes / _TRACED),
    }
    return {f"{name} one of {CONTEXTS:,}": times_of(s) for name, s in spent.items()}, memory
