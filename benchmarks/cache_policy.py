"""Replays a trace of prompts' blocks through the tiers' policy, beside LRU, S3-FIFO and Belady.

    python -m benchmarks.cache_policy --trace ../shared/traces/mooncake_synthetic.csv.gz

The trace is a CSV, gzip'd or not, with a column `hash_ids`: ids of a prompt's blocks joined by `;`.
A block counts as a hit if it and all blocks before it are in the cache when its prompt comes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import random
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.kv.tiers.policy import TierPolicy
from tandem_runtime.prefix import block_keys

from benchmarks.report import Target, finish

SHARES: Final = (5, 10, 20, 40)
"""Percent of the trace's unique blocks that fit the cache."""
SCAN_PROMPTS: Final = 10_000
TENANTS: Final = 4
CONTEXT_TOKENS: Final = 1_000_000


@dataclass(frozen=True)
class Prompt:
    tenant: str
    keys: tuple[bytes, ...]


Replay = Callable[[Sequence[Prompt], int], list[int]]
"""Hits of each prompt, with a cache of so many blocks."""


def read_trace(path: Path) -> list[Prompt]:
    """The trace names no tenants: all prompts are of one."""
    text = path.read_bytes()
    lines = (gzip.decompress(text) if path.suffix == ".gz" else text).decode().splitlines()
    rows = [row["hash_ids"].split(";") for row in csv.DictReader(lines)]
    return [Prompt("tenant", tuple(map(key, ids))) for ids in rows]


def split(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same, of four tenants; prompts with a block in common are of one."""
    return [Prompt(f"tenant-{prompt.keys[0][0] % TENANTS}", prompt.keys) for prompt in prompts]


def key(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()


def leading(keys: Sequence[bytes], held: Callable[[bytes], bool]) -> int:
    for place, one in enumerate(keys):
        if not held(one):
            return place
    return len(keys)


# -- the caches -------------------------------------------------------------------------------


def tandem(prompts: Sequence[Prompt], capacity: int) -> list[int]:
    policy, hits = TierPolicy(capacity), []
    for prompt in prompts:
        hits.append(policy.lookup(prompt.keys))
        policy.use(prompt.tenant, prompt.keys)
        if policy.resident_pages > capacity:
            raise RuntimeError(f"the policy keeps {policy.resident_pages} blocks of {capacity}")
    return hits


def lru(prompts: Sequence[Prompt], capacity: int, *, end_first: bool = False) -> list[int]:
    held: OrderedDict[bytes, None] = OrderedDict()
    hits = []
    for prompt in prompts:
        hits.append(leading(prompt.keys, held.__contains__))
        for one in reversed(prompt.keys) if end_first else prompt.keys:
            held[one] = None
            held.move_to_end(one)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits


def lru_end_first(prompts: Sequence[Prompt], capacity: int) -> list[int]:
    """Of one prompt the end goes before the beginning, as in the accelerator's pool."""
    return lru(prompts, capacity, end_first=True)


class S3Fifo:
    """Small, main and ghost queue (Yang et al., SOSP'23); the small one takes a tenth."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small: OrderedDict[bytes, None] = OrderedDict()
        self._main: OrderedDict[bytes, None] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()
        self.uses: dict[bytes, int] = {}

    def access(self, one: bytes) -> None:
        if one in self.uses:
            self.uses[one] = min(3, self.uses[one] + 1)
            return
        queue = self._main if self._ghost.pop(one, 0) is None else self._small
        queue[one] = None
        self.uses[one] = 0
        while len(self.uses) > self._capacity:
            self._evict()

    def _evict(self) -> None:
        if len(self._small) > self._capacity // 10 or not self._main:
            one, _ = self._small.popitem(last=False)
            if self.uses[one] > 1:
                self._main[one], self.uses[one] = None, 0
                return
            self._ghost[one] = None
            if len(self._ghost) > self._capacity:
                self._ghost.popitem(last=False)
        else:
            one, _ = self._main.popitem(last=False)
            if self.uses[one]:
                self._main[one] = None
                self.uses[one] -= 1
                return
        del self.uses[one]


def s3_fifo(prompts: Sequence[Prompt], capacity: int) -> list[int]:
    cache, hits = S3Fifo(capacity), []
    for prompt in prompts:
        hits.append(leading(prompt.keys, cache.uses.__contains__))
        for one in prompt.keys:
            cache.access(one)
    return hits


def belady(prompts: Sequence[Prompt], capacity: int) -> list[int]:
    """Evicts what is used again last; it knows the future."""
    never = len(prompts)
    upcoming: dict[bytes, int] = {}
    next_uses: list[list[int]] = []
    for number in range(never - 1, -1, -1):
        keys = prompts[number].keys
        next_uses.append([upcoming.get(one, never) for one in keys])
        upcoming.update(dict.fromkeys(keys, number))
    held: dict[bytes, int] = {}
    last: list[tuple[int, int, bytes]] = []
    hits = []
    for prompt, uses in zip(prompts, reversed(next_uses), strict=True):
        hits.append(leading(prompt.keys, held.__contains__))
        for place, (one, use) in enumerate(zip(prompt.keys, uses, strict=True)):
            held[one] = use
            heapq.heappush(last, (-use, -place, one))
        while len(held) > capacity:
            use, _, one = heapq.heappop(last)
            if held.get(one) == -use:
                del held[one]
    return hits


CACHES: Final[dict[str, Replay]] = {
    "LRU": lru,
    "LRU, end first": lru_end_first,
    "S3-FIFO": s3_fifo,
    "tandem": tandem,
    "Belady": belady,
}


# -- what is measured -------------------------------------------------------------------------


def ratio(prompts: Sequence[Prompt], hits: Sequence[int], tenants: str = "") -> float:
    """Percent of blocks that were hits, of tenants whose names begin so."""
    chosen = [i for i, prompt in enumerate(prompts) if prompt.tenant.startswith(tenants)]
    return 100 * sum(hits[i] for i in chosen) / sum(len(prompts[i].keys) for i in chosen)


def with_scan(prompts: Sequence[Prompt], seed: int = 7) -> list[Prompt]:
    """Prompts of one more tenant that never repeat, as long as the trace's, evenly mixed in."""
    chance = random.Random(seed)
    mixed: list[Prompt] = []
    scans = scan_prompts(prompts)
    for number, prompt in enumerate(prompts):
        due = SCAN_PROMPTS * (number + 1) // len(prompts) - SCAN_PROMPTS * number // len(prompts)
        group = [prompt, *(next(scans) for _ in range(due))]
        chance.shuffle(group)
        mixed += group
    return mixed


def scan_prompts(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    for number in range(SCAN_PROMPTS):
        blocks = len(prompts[number % len(prompts)].keys)
        yield Prompt("scan", tuple(key(f"scan {number} {place}") for place in range(blocks)))


def long_context() -> dict[str, float]:
    """Milliseconds to hash and to look up a context of a million tokens; the best of some runs."""
    chance = random.Random(3)
    ids = array("I", (chance.randrange(128_000) for _ in range(CONTEXT_TOKENS)))
    pages = CONTEXT_TOKENS // KV_PAGE_TOKENS
    root = bytes(32)
    policy = TierPolicy(pages)
    policy.use("tenant", block_keys(root, ids, KV_PAGE_TOKENS))
    hash_ms, lookup_ms = [], []
    for _ in range(9):
        begun_s = time.perf_counter()
        keys = block_keys(root, ids, KV_PAGE_TOKENS)
        hashed_s = time.perf_counter()
        found = policy.lookup(keys)
        lookup_ms.append(1e3 * (time.perf_counter() - hashed_s))
        hash_ms.append(1e3 * (hashed_s - begun_s))
        if found != pages:
            raise RuntimeError(f"{found} of {pages} pages were found")
    return {
        "hash_ms": round(min(hash_ms), 2),
        "lookup_ms": round(min(lookup_ms), 2),
        "index_bytes_a_page": round(policy.page_bytes, 1),
    }


def show(ratios: dict[str, dict[int, float]]) -> None:
    table = Table(title="block hit ratio, %, by share of the unique blocks that fit")
    table.add_column("cache")
    for share in SHARES:
        table.add_column(f"{share} %", justify="right")
    for name, found in ratios.items():
        table.add_row(name, *(f"{found[share]:.2f}" for share in SHARES))
    Console().print(table)


def targets_of(
    ratios: dict[str, dict[int, float]],
    bound: float,
    falls: dict[int, float],
    context: dict[str, float],
) -> list[Target]:
    ours, best = ratios["tandem"], ratios["Belady"]
    return [
        Target("points above LRU at 10 %", round(ours[10] - ratios["LRU"][10], 2), 3, "at least"),
        Target("points above S3-FIFO at 10 %", round(ours[10] - ratios["S3-FIFO"][10], 2), None),
        Target("tandem / Belady at 40 %", round(ours[40] / best[40], 4), 0.9, "at least"),
        Target("infinite cache, %", round(bound, 1), 64.0, "at least"),
        *(
            Target(f"points that other tenants lose to a scan at {share} %", round(fall, 2), 2)
            for share, fall in falls.items()
        ),
        Target("index bytes a page", context["index_bytes_a_page"], 64),
        Target(
            "hash and look up 1,000,000 tokens, ms",
            round(context["hash_ms"] + context["lookup_ms"], 2),
            20,
        ),
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trace", type=Path, required=True, help="CSV with a column hash_ids")
    parser.add_argument("--quick", action="store_true", help="no result file")
    options = parser.parse_args()
    prompts = read_trace(options.trace)
    unique = len({one for prompt in prompts for one in prompt.keys})
    capacities = {share: unique * share // 100 for share in SHARES}
    ratios = {
        name: {share: ratio(prompts, replay(prompts, n)) for share, n in capacities.items()}
        for name, replay in CACHES.items()
    }
    bound = ratio(prompts, lru(prompts, unique))
    several = split(prompts)
    mixed = with_scan(several)
    falls = {}
    for share in (10, 40):
        alone = ratio(several, tandem(several, capacities[share]))
        beside = ratio(mixed, tandem(mixed, capacities[share]), "tenant-")
        falls[share] = alone - beside
    context = long_context()
    show(ratios)
    print(f"of {unique} unique blocks; an infinite cache: {bound:.2f} %")
    finish(
        "cache_policy",
        targets_of(ratios, bound, falls, context),
        {"hit_percent": ratios, "context": context, "unique_blocks": unique},
        save=not options.quick,
    )


if __name__ == "__main__":
    main()
