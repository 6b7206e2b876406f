"""Engines that share a remote tier give the streams of one without, whatever becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from stores import ValkeyServer, valkey_server
from tandem_runtime.engine.engine import Engine
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers import stores as stores_module
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Tier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Job, Jobs, JobThread
from tandem_runtime.kv.tiers.remote import RemoteTier
from tandem_runtime.kv.tiers.stores import Store, open_store
from tiered_engines import ask, run

MakeEngine = Callable[..., Engine]
PAGE = 32
DOCUMENT, OTHER = [7, 11, 13, 17] * 40, [5, 3, 2] * 50


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with valkey_server() as server:
        yield server


@pytest.fixture
def make(make_engine: MakeEngine) -> Iterator[Callable[..., Engine]]:
    """`make(store or URI, memory_pages, compute_s, jobs)`: an engine with a remote tier."""
    engines: list[Engine] = []

    def one(
        where: Store | str,
        memory_pages: int = 0,
        compute_s: float = 1.0,
        jobs: Jobs | None = None,
    ) -> Engine:
        def tiers(layout: KvLayout, layout_hash: bytes) -> TierCache:
            size = layout.token_bytes * PAGE
            store = where
            if isinstance(store, str):
                store = open_store(store, {}, ttl_s=60, value_bytes=size)
            known: dict[str, Any] = {"layout_hash": layout_hash, "page_bytes": size}
            remote = RemoteTier(store, page_tokens=PAGE, remembered_pages=100, **known)
            own: list[Tier] = []
            if memory_pages:
                own.append(HostTier(memory_pages * size, page_bytes=size))
            return TierCache(
                own,
                jobs or JobThread(),
                page_tokens=PAGE,
                compute_s=compute_s,
                remote=(remote, JobThread("remote tier")),
            )

        engines.append(make_engine(tiers=tiers, page_tokens=PAGE))
        return engines[-1]

    yield one
    for engine in engines:
        engine.close()


def remote_of(engine: Engine) -> RemoteTier:
    assert engine.tiers is not None
    (remote,) = [tier for tier in engine.tiers.tiers if isinstance(tier, RemoteTier)]
    return remote


def wait_stored(engine: Engine, pages: int) -> None:
    deadline_s = time.monotonic() + 30
    while remote_of(engine).counters.stored_pages < pages:
        assert time.monotonic() < deadline_s, remote_of(engine).counters
        time.sleep(0.01)


def hits(engine: Engine) -> dict[tuple[str, str], int]:
    assert engine.tiers is not None
    return engine.tiers.hit_tokens


def test_what_one_pod_computed_another_loads(
    make: Callable[..., Engine], make_engine: MakeEngine, server: ValkeyServer
) -> None:
    naive = run(make_engine(), ask("s", DOCUMENT))
    one, other = make(server.uri, memory_pages=9), make(server.uri, memory_pages=9)
    assert run(one, ask("s", DOCUMENT)) == naive
    wait_stored(one, 5)
    assert run(other, ask("s", DOCUMENT)) == naive
    assert other.stats().cached_tokens == 128
    assert hits(other) == {("remote", "default"): 128}
    # It has them in its own memory now, beside the one page that it computed.
    third = run(other, ask("t", [*DOCUMENT, 1]))
    assert third == run(make_engine(), ask("t", [*DOCUMENT, 1]))


def test_tenants_and_salts_do_not_meet(make: Callable[..., Engine], server: ValkeyServer) -> None:
    one, other = make(server.uri), make(server.uri)
    run(one, ask("a", DOCUMENT, tenant="a"))
    wait_stored(one, 5)
    run(other, ask("b", DOCUMENT, tenant="b"))
    run(other, ask("c", DOCUMENT, tenant="a", cache_salt="x"))
    assert hits(other) == {}
    run(other, ask("a", DOCUMENT, tenant="a"))
    assert hits(other) == {("remote", "a"): 128}


@pytest.mark.parametrize("fault", ["stopped", "frozen", "wiped", "full"])
def test_a_fault_of_the_server_costs_time_alone(
    make: Callable[..., Engine],
    make_engine: MakeEngine,
    server: ValkeyServer,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.setattr(stores_module, "SILENT_S", 0.2)
    one, other = make(server.uri), make(server.uri)
    run(one, ask("s", DOCUMENT))
    wait_stored(one, 5)
    with server.client() as client:
        if fault == "stopped":
            server.stop()
        elif fault == "frozen":
            server.freeze()
        elif fault == "wiped":
            client.flushall()
        else:
            client.config_set("maxmemory", 1)
            client.config_set("maxmemory-policy", "noeviction")
    for number, prompt in enumerate((DOCUMENT, OTHER, [*OTHER, 1], DOCUMENT[:100])):
        naive = run(make_engine(), ask(f"{number}", prompt))
        assert run(other, ask(f"{number}", prompt)) == naive
    failures = {"stopped": "unreachable", "frozen": "slow", "wiped": None, "full": "full"}
    found = remote_of(other).counters.failures
    assert set(found) - {"unavailable"} == ({failures[fault]} if failures[fault] else set())


class Stuck:
    """A `Store` that answers when it is let."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        assert self.go_on.wait(60)
        return [None for _ in names]

    def put(self, records: Sequence[tuple[str, bytes]]) -> None:
        assert self.go_on.wait(60)

    def close(self) -> None: ...


def test_no_prompt_waits_longer_than_computing_takes(
    make: Callable[..., Engine], make_engine: MakeEngine
) -> None:
    store = Stuck()
    engine = make(store, memory_pages=9, compute_s=0.001)
    try:
        for name, prompt in (("a", DOCUMENT), ("b", OTHER)):
            assert run(engine, ask(name, prompt)) == run(make_engine(), ask(name, prompt))
        # What the pod has itself is found beside the store that does not answer.
        assert run(engine, ask("c", DOCUMENT[:128])) == run(make_engine(), ask("c", DOCUMENT[:128]))
        assert not store.go_on.is_set()
    finally:
        store.go_on.set()


class Alarms(JobThread):
    """Time is up when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self._alarms: list[Job] = []

    def later(self, delay_s: float, job: Job) -> None:
        self._alarms.append(job)

    def ring(self) -> None:
        for job in self._alarms:
            self.put(job, urgent=True)


class OnePage(Stuck):
    """A `Store` that gives one page and then nothing before time is up."""

    def __init__(self, inner: Store, alarms: Alarms) -> None:
        super().__init__()
        self._inner = inner
        self._alarms = alarms
        self._calls = 0

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        self._calls += 1
        if self._calls == 1:
            return self._inner.get(names)
        self._alarms.ring()
        return super().get(names)


def test_what_came_in_time_is_used(
    make: Callable[..., Engine], make_engine: MakeEngine, server: ValkeyServer
) -> None:
    one = make(server.uri)
    naive = run(one, ask("s", DOCUMENT))
    wait_stored(one, 5)
    size = one.layout.token_bytes * PAGE
    alarms = Alarms()
    store = OnePage(open_store(server.uri, {}, ttl_s=60, value_bytes=size), alarms)
    other = make(store, jobs=alarms)
    try:
        assert run(other, ask("s", DOCUMENT)) == naive
        assert hits(other) == {("remote", "default"): PAGE}
    finally:
        store.go_on.set()
