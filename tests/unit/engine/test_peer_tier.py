"""Engines that are given each other's pages give the streams of one that computes all itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tandem_runtime.engine.engine import Engine
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Counters, Page, Tier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import JobThread
from tandem_runtime.kv.tiers.remote import RemoteTier
from tandem_runtime.kv.tiers.speed import Speed
from tandem_runtime.protocol import PrefillTarget
from tiered_engines import ask, run

MakeEngine = Callable[..., Engine]
PAGE, BLOCK = 32, 16
DOCUMENT, OTHER = [7, 11, 13, 17] * 40, [5, 3, 2] * 50
HOLDER = PrefillTarget("pod-1", "127.0.0.1", 1)


class Neighbour:
    """`Peers` without a network: another engine of this process."""

    name = "peer"

    def __init__(self) -> None:
        self.counters = Counters()
        self.speed = Speed()
        self.engine: Engine | None = None
        self.most_pages = 100
        self.asked: list[list[bytes]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def at(
        self, address: PrefillTarget, block_keys: Sequence[bytes], keys: Any, until_s: float
    ) -> Neighbour:
        assert address == HOLDER
        self.blocks = {k: block_keys[2 * n : 2 * n + 2] for n, k in enumerate(keys)}
        self.places = list(keys)
        return self

    def load(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
        self.asked.append(list(keys))
        assert self.go_on.wait(60)
        found: list[Page] = []
        for key, ids in zip(keys, tokens, strict=True):
            lent = None
            if self.engine is not None and self.places.index(key) < self.most_pages:
                lent = self.engine.lending.read(self.blocks[key], ids)
            if lent is None:
                break
            found.append(Page(key, b"", ids, lent.payload, lent.decoded))
        return found

    def close(self) -> None: ...


class Kept:
    """A `Store` in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        return [self.values.get(name) for name in names]

    def put(self, records: Sequence[tuple[str, bytes]]) -> None:
        self.values.update(records)

    def close(self) -> None: ...


Make = Callable[..., Engine]


@pytest.fixture
def make(make_engine: MakeEngine) -> Iterator[Make]:
    """`make(neighbour, memory_pages, store, compute_s)`: an engine with a tier of peers."""
    engines: list[Engine] = []

    def one(
        neighbour: Any, memory_pages: int = 0, store: Kept | None = None, compute_s: float = 1.0
    ) -> Engine:
        def tiers(layout: KvLayout, layout_hash: bytes) -> TierCache:
            size = layout.token_bytes * PAGE
            own: list[Tier] = []
            if memory_pages:
                own.append(HostTier(memory_pages * size, page_bytes=size))
            remote = None
            if store is not None:
                known: dict[str, Any] = {"layout_hash": layout_hash, "page_bytes": size}
                remote = (RemoteTier(store, page_tokens=PAGE, **known), JobThread("remote tier"))
            return TierCache(
                own,
                JobThread(),
                page_tokens=PAGE,
                compute_s=compute_s,
                remote=remote,
                peers=(neighbour, JobThread("peers")),
            )

        engines.append(make_engine(tiers=tiers, page_tokens=PAGE))
        return engines[-1]

    yield one
    for engine in engines:
        engine.close()


def hits(engine: Engine) -> dict[tuple[str, str], int]:
    assert engine.tiers is not None
    return engine.tiers.hit_tokens


def test_what_one_pod_computed_another_is_given(make: Make, make_engine: MakeEngine) -> None:
    neighbour = Neighbour()
    neighbour.engine = one = make_engine()
    naive = run(one, ask("s", DOCUMENT))
    other = make(neighbour, memory_pages=9)
    assert run(other, ask("s", DOCUMENT, holder=HOLDER)) == naive
    assert other.stats().cached_tokens == 128
    assert hits(other) == {("peer", "default"): 128}
    assert other.tiers is not None
    assert 1 <= other.tiers.peer_percent < 100
    # One page to see how fast it is, then several at a time; each once.
    assert [len(keys) for keys in neighbour.asked] == [1, 3]
    # Its own tier keeps them now, beside the page that it computed.
    memory = other.tiers.tiers[0]
    deadline_s = time.monotonic() + 60
    while memory.counters.stored_pages < 5:
        assert time.monotonic() < deadline_s, memory.counters
        time.sleep(0.01)


def test_without_a_name_nobody_is_asked(make: Make, make_engine: MakeEngine) -> None:
    neighbour = Neighbour()
    neighbour.engine = one = make_engine()
    naive = run(one, ask("s", DOCUMENT))
    other = make(neighbour)
    assert run(other, ask("s", DOCUMENT)) == naive
    assert run(other, ask("short", DOCUMENT[:PAGE], holder=HOLDER))  # less than a page to load
    assert neighbour.asked == []
    assert other.tiers is not None
    assert other.tiers.peer_percent == 25  # not known


def test_what_the_peer_lacks_the_remote_tier_is_asked_for(
    make: Make, make_engine: MakeEngine
) -> None:
    neighbour, store = Neighbour(), Kept()
    neighbour.most_pages = 2
    neighbour.engine = one = make(neighbour, store=store)
    naive = run(one, ask("s", DOCUMENT))
    deadline_s = time.monotonic() + 60
    while len(store.values) < 5:
        assert time.monotonic() < deadline_s, store.values.keys()
        time.sleep(0.01)
    other = make(neighbour, store=store)
    assert run(other, ask("s", DOCUMENT, holder=HOLDER)) == naive
    assert hits(other) == {("peer", "default"): 2 * PAGE, ("remote", "default"): 2 * PAGE}


def test_no_prompt_waits_longer_than_computing_takes(make: Make, make_engine: MakeEngine) -> None:
    neighbour = Neighbour()
    neighbour.go_on.clear()
    engine = make(neighbour, memory_pages=9, compute_s=0.001)
    try:
        for name, prompt in (("a", DOCUMENT), ("b", OTHER)):
            naive = run(make_engine(), ask(name, prompt))
            assert run(engine, ask(name, prompt, holder=HOLDER)) == naive
        assert len(neighbour.asked) == 1  # the second one's time was up before
        assert hits(engine) == {}
    finally:
        neighbour.go_on.set()


def test_a_peer_that_is_slower_than_computing_is_passed_over(
    make: Make, make_engine: MakeEngine
) -> None:
    neighbour = Neighbour()
    neighbour.engine = make_engine()
    naive = run(neighbour.engine, ask("s", DOCUMENT))
    other = make(neighbour)
    neighbour.speed.page_s = 33.0  # a page of 32 tokens takes 32 s to compute
    assert run(other, ask("s", DOCUMENT, holder=HOLDER)) == naive
    assert neighbour.asked == []


def test_a_peer_that_breaks_costs_its_pages_alone(make: Make, make_engine: MakeEngine) -> None:
    class Broken(Neighbour):
        def load(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
            raise RuntimeError("a fault of ours")

    engine = make(Broken())
    naive = run(make_engine(), ask("s", DOCUMENT))
    assert run(engine, ask("s", DOCUMENT, holder=HOLDER)) == naive


def test_a_stream_that_ends_while_it_is_fetched(make: Make, make_engine: MakeEngine) -> None:
    neighbour = Neighbour()
    neighbour.engine = make_engine()
    naive = run(neighbour.engine, ask("s", DOCUMENT))
    neighbour.go_on.clear()
    other = make(neighbour, memory_pages=9)
    assert other.add(ask("s", DOCUMENT, holder=HOLDER)) is None
    assert other.abort("s")
    neighbour.go_on.set()
    assert run(other, ask("t", DOCUMENT, holder=HOLDER)) == naive
    assert other.stats().held_blocks == 0
