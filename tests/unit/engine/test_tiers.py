"""Streams whose KV comes from cache tiers are the same streams, and wait for nobody."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem_runtime.engine import tiered
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Tier
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Job, Jobs, JobThread
from tandem_runtime.kv.tiers.kept import Keep, Kept
from tandem_runtime.protocol import Sampling

MakeEngine = Callable[..., Engine]
PAGE = 32
DOCUMENTS = [[7, 11, 13, 17] * 40, [5, 3, 2] * 50, list(range(100))]


class Inline:
    """Jobs that run at once."""

    def put(self, job: Job, *, urgent: bool = False) -> None:
        job()

    def later(self, delay_s: float, job: Job) -> None:
        pass

    def close(self) -> None:
        pass


class Later:
    """Jobs that run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def put(self, job: Job, *, urgent: bool = False) -> None:
        self.jobs.append(job)

    def later(self, delay_s: float, job: Job) -> None:
        pass

    def run(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()

    def close(self) -> None:
        self.run()


def cache(
    memory_pages: int = 0, disk: Path | None = None, jobs: Jobs | None = None, compute_s: float = 1
) -> Callable[[KvLayout, bytes], TierCache]:
    def make(layout: KvLayout, layout_hash: bytes) -> TierCache:
        size = layout.token_bytes * PAGE
        tiers: list[Tier] = []
        if memory_pages:
            tiers.append(HostTier(memory_pages * size, page_bytes=size))
        if disk is not None:
            known: dict[str, Any] = {"page_bytes": size, "page_tokens": PAGE}
            tiers.append(
                DiskTier(disk, 60 * size, layout_hash=layout_hash, segment_bytes=6 * size, **known)
            )
        return TierCache(tiers, jobs or Inline(), page_tokens=PAGE, compute_s=compute_s)

    return make


def ask(name: str, prompt: list[int], **changes: Any) -> Request:
    sampling = Sampling(max_tokens=5, temperature=0.8, seed=3, logprobs=1, ignore_eos=True)
    return Request(name, prompt, sampling, **changes)


def run(engine: Engine, *requests: Request, patient: bool = False) -> dict[str, list[SampledToken]]:
    tokens: dict[str, list[SampledToken]] = {}
    for request in requests:
        assert engine.add(request) is None
    steps = 0
    while engine.has_work or (patient and engine.stats().waiting):
        if not engine.has_work:  # the tiers' thread looks a prompt up
            time.sleep(0.001)
            continue
        for stream in engine.step().streams:
            if stream.token is not None:
                tokens.setdefault(stream.request_id, []).append(stream.token)
        engine.check_integrity()
        steps += 1
        assert steps < 3000, "no end"
    return tokens


def test_a_prompt_comes_back_from_memory(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=14, tiers=cache(memory_pages=20), page_tokens=PAGE)
    cold = run(engine, ask("cold", DOCUMENTS[0]))["cold"]
    run(engine, ask("other", DOCUMENTS[1] + DOCUMENTS[2][:40]))  # pushes it out of the pool
    before = engine.stats().cached_tokens
    assert run(engine, ask("warm", DOCUMENTS[0]))["warm"] == cold
    assert engine.stats().cached_tokens - before == 128
    assert engine.tiers is not None
    assert engine.tiers.hit_tokens == {("memory", "default"): 128}


def test_after_a_restart_it_comes_back_from_disk(make_engine: MakeEngine, tmp_path: Path) -> None:
    first = make_engine(tiers=cache(disk=tmp_path), page_tokens=PAGE)
    cold = run(first, ask("s", DOCUMENTS[0] + [1]))["s"]
    first.close()
    second = make_engine(tiers=cache(4, disk=tmp_path), page_tokens=PAGE)
    assert run(second, ask("s", DOCUMENTS[0] + [1]))["s"] == cold
    assert second.stats().cached_tokens == 160
    assert second.tiers is not None
    assert second.tiers.hit_tokens == {("disk", "default"): 160}


def test_tenants_and_salts_do_not_meet_in_a_tier(make_engine: MakeEngine) -> None:
    engine = make_engine(tiers=cache(memory_pages=20), page_tokens=PAGE)
    run(engine, ask("a", DOCUMENTS[0], tenant="a"))
    run(engine, ask("b", DOCUMENTS[0], tenant="b"), ask("c", DOCUMENTS[0], cache_salt="x"))
    assert engine.stats().cached_tokens == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 150), st.lists(st.integers(0, 99), max_size=9)),
        min_size=1,
        max_size=7,
    ),
    together=st.integers(1, 3),
    budget=st.integers(8, 90),
    blocks=st.integers(11, 30),
    memory_pages=st.integers(0, 9),
    overlaps=st.booleans(),
    threads=st.integers(1, 2),
    reserve=st.sampled_from([0, 64]),
    swap_bytes=st.sampled_from([0, 1 << 20]),
)
def test_streams_from_tiers_equal_the_naive_run(
    make_engine: MakeEngine,
    dtype: str,
    prompts: list[tuple[int, int, list[int]]],
    together: int,
    budget: int,
    blocks: int,
    memory_pages: int,
    overlaps: bool,
    threads: int,
    reserve: int,
    swap_bytes: int,
) -> None:
    asks = [
        ask(str(number), (DOCUMENTS[document][:cut] + tail) or [1])
        for number, (document, cut, tail) in enumerate(prompts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(
            dtype=dtype,
            blocks=blocks,
            max_batch_tokens=budget,
            max_running=4,
            overlaps=overlaps,
            threads=threads,
            growth_reserve_tokens=reserve,
            swap_bytes=swap_bytes,
            tiers=cache(memory_pages, Path(folder)),
            page_tokens=PAGE,
        )
        for first in range(0, len(asks), together):
            found = run(engine, *asks[first : first + together])
            for one in asks[first : first + together]:
                naive = make_engine(dtype=dtype, prefix_caching=False)
                assert found[one.request_id] == run(naive, one)[one.request_id]
        engine.close()


def test_others_pass_a_stream_whose_pages_are_being_loaded(make_engine: MakeEngine) -> None:
    jobs = Later()
    engine = make_engine(tiers=cache(memory_pages=20, jobs=jobs), page_tokens=PAGE)
    assert engine.add(ask("slow", DOCUMENTS[0])) is None
    assert not engine.has_work
    assert len(run(engine, ask("short", [1, 2, 3]))["short"]) == 5
    jobs.run()
    assert engine.has_work
    assert len(run(engine)["slow"]) == 5


def test_a_stream_that_ends_while_it_is_fetched_leaves_nothing(make_engine: MakeEngine) -> None:
    jobs = Later()
    engine = make_engine(tiers=cache(memory_pages=20, jobs=jobs), page_tokens=PAGE)
    engine.add(ask("s", DOCUMENTS[0]))
    assert engine.abort("s")
    # The name is free again; the older answer is not taken for this prompt's.
    engine.add(ask("s", DOCUMENTS[1]))
    jobs.run()
    other = run(engine)["s"]
    jobs.run()
    assert other == run(make_engine(), ask("s", DOCUMENTS[1]))["s"]
    assert engine.tiers is not None
    (memory,) = engine.tiers.tiers
    assert memory.policy.resident_pages == len(DOCUMENTS[1]) // PAGE


def test_a_stream_that_is_fetched_can_be_frozen(make_engine: MakeEngine) -> None:
    jobs = Later()
    engine = make_engine(tiers=cache(memory_pages=20, jobs=jobs), page_tokens=PAGE)
    engine.add(ask("s", DOCUMENTS[0]))
    stats = engine.stats()
    assert (stats.waiting, stats.queued_tokens) == (1, len(DOCUMENTS[0]))
    assert engine.freeze("s")
    engine.check_integrity()
    jobs.run()
    assert not engine.step().streams
    assert not engine.has_work
    engine.thaw("s")
    assert run(engine)["s"] == run(make_engine(), ask("s", DOCUMENTS[0]))["s"]


@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
def test_a_stream_is_frozen_while_its_pages_are_written(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    engine = make_engine(blocks=14, tiers=cache(memory_pages=20), page_tokens=PAGE)
    cold = run(engine, ask("cold", DOCUMENTS[0]))["cold"]
    run(engine, ask("other", DOCUMENTS[1] + DOCUMENTS[2][:40]))
    monkeypatch.setattr(tiered, "LOADING_S", 0.0)
    engine.add(ask("warm", DOCUMENTS[0]))
    while engine.computed_tokens("warm") == 0:
        engine.step()
    assert engine.freeze("warm")
    assert not engine.loads_kv
    assert engine.computed_tokens("warm") == PAGE
    if not moves:
        engine.thaw("warm")
        assert run(engine)["warm"] == cold
        return
    target = make_engine(tiers=cache(memory_pages=20), page_tokens=PAGE)
    assert target.expect(ask("warm", DOCUMENTS[0]), headroom_tokens=5) is None
    assert target.grant("warm", len(DOCUMENTS[0])) is not None
    target.write_kv("warm", 0, bytes(engine.read_kv("warm", 0, PAGE)))
    target.resume("warm")
    assert engine.abort("warm")
    assert run(target)["warm"] == cold
    assert engine.stats().held_blocks == target.stats().held_blocks == 0


def test_a_preempted_stream_comes_back_from_swap_beside_tiers(make_engine: MakeEngine) -> None:
    tight: dict[str, Any] = {"blocks": 11, "growth_reserve_tokens": 0, "prefix_caching": False}
    engine = make_engine(
        **tight, swap_bytes=1 << 20, tiers=cache(memory_pages=20), page_tokens=PAGE
    )
    asks = [ask(str(number), DOCUMENTS[number][:79]) for number in range(2)]  # 5 blocks, then 6
    for _ in range(2):  # the second time both come from memory
        found = run(engine, *asks)
        for one in asks:
            assert found[one.request_id] == run(make_engine(), one)[one.request_id]
    assert engine.stats().preemptions >= 2
    assert engine.tiers is not None
    assert engine.tiers.hit_tokens == {("memory", "default"): 2 * 64}


def test_all_wanted_pages_of_an_export_are_kept(make_engine: MakeEngine) -> None:
    """It is computed in one step, and in no later one."""
    engine = make_engine(tiers=cache(memory_pages=20), page_tokens=PAGE)
    engine.add(ask("s", DOCUMENTS[0], export=True))
    engine.step()
    assert engine.release("s")
    assert engine.tiers is not None
    (memory,) = engine.tiers.tiers
    assert memory.counters.stored_pages == memory.policy.resident_pages == 5


def test_a_load_that_is_slower_than_computing_is_not_done(make_engine: MakeEngine) -> None:
    make = cache(memory_pages=20, compute_s=1e-12)
    engine = make_engine(blocks=14, tiers=make, page_tokens=PAGE)
    other = DOCUMENTS[1] + DOCUMENTS[2][:40]
    for round_ in range(3):
        run(engine, ask(f"{round_}", DOCUMENTS[0]))
        run(engine, ask(f"other {round_}", other))
    assert engine.tiers is not None
    # The first page that was loaded said how long that takes.
    assert engine.tiers.hit_tokens == {("memory", "default"): PAGE}


def test_pages_are_written_a_few_in_each_step(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(blocks=14, tiers=cache(memory_pages=20), page_tokens=PAGE)
    cold = run(engine, ask("cold", DOCUMENTS[0]))["cold"]
    run(engine, ask("other", DOCUMENTS[1] + DOCUMENTS[2][:40]))
    monkeypatch.setattr(tiered, "LOADING_S", 0.0)
    engine.add(ask("warm", DOCUMENTS[0]))
    engine.add(ask("beside", [4, 5]))
    outputs = [engine.step() for _ in range(4)]
    assert [o.request_id for output in outputs for o in output.streams] == ["beside"] * 4
    assert engine.loads_kv
    assert run(engine)["warm"] == cold
    assert not engine.loads_kv


def test_a_page_is_written_in_pieces_between_steps(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(blocks=14, tiers=cache(memory_pages=20), page_tokens=PAGE)
    cold = run(engine, ask("cold", DOCUMENTS[0]))["cold"]
    run(engine, ask("other", DOCUMENTS[1] + DOCUMENTS[2][:40]))
    layers = engine.layout.layers
    assert layers > 1
    monkeypatch.setattr(tiered, "LOADING_S", 0.0)
    monkeypatch.setattr(engine._tiered, "_piece_bytes", 1)  # a layer
    waited: list[float] = []
    engine.observe_loading(waited.append)
    engine.add(ask("warm", DOCUMENTS[0]))
    engine.add(
        ask(
            "beside",
            [4, 5],
        )
    )
    tokens = []
    for _ in range(4):
        tokens += [o.token for o in engine.step().streams if o.request_id == "beside"]
    # Each step wrote a layer and gave the other stream its token.
    assert len(tokens) == 4
    assert engine.computed_tokens("warm") == PAGE * (3 // layers)
    assert run(engine)["warm"] == cold
    # One wait for the look-up, and one for each layer of each page.
    assert len(waited) == 1 + 4 * layers


def test_a_tier_that_fails_costs_time_and_nothing_else(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiers=cache(memory_pages=20), page_tokens=PAGE)
    assert engine.tiers is not None

    def broken(tenant: str, keys: object) -> list[int]:
        raise RuntimeError("a fault")

    engine.tiers.tiers[0].use = broken  # type: ignore[method-assign, assignment]
    found = run(engine, ask("s", DOCUMENTS[0]))["s"]
    assert found == run(make_engine(), ask("s", DOCUMENTS[0]))["s"]
    assert "the cache tiers failed" in caplog.text


def test_a_backlog_is_not_kept(make_engine: MakeEngine) -> None:
    jobs = Later()
    engine = make_engine(tiers=cache(memory_pages=40, jobs=jobs), page_tokens=PAGE)
    prompts = [[n] * 160 for n in range(5)]
    for number, prompt in enumerate(prompts):
        engine.add(ask(str(number), prompt))
    jobs.run()
    run(engine)  # 25 pages are computed, and none is stored meanwhile
    jobs.run()
    assert engine.tiers is not None
    (memory,) = engine.tiers.tiers
    assert memory.counters.stored_pages == memory.policy.resident_pages == 16


def test_urgent_jobs_come_first_and_a_failure_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    jobs, begun, done = JobThread(), threading.Event(), []

    def fail() -> None:
        begun.wait(5)
        raise RuntimeError("a fault")

    jobs.put(fail)
    jobs.put(lambda: done.append("store"))
    jobs.put(lambda: done.append("fetch"), urgent=True)
    begun.set()
    jobs.close()
    assert done == ["fetch", "store"]
    assert "a job of the cache tiers failed" in caplog.text


def test_on_a_thread(make_engine: MakeEngine, tmp_path: Path) -> None:
    jobs = JobThread()
    engine = make_engine(tiers=cache(9, tmp_path, jobs), page_tokens=PAGE)
    woken = threading.Event()
    assert engine.tiers is not None
    engine.tiers.wake = woken.set
    results = []
    for name in ("cold", "warm"):
        woken.clear()
        engine.add(ask(name, DOCUMENTS[0]))
        assert woken.wait(5)
        results.append(run(engine)[name])
        time.sleep(0)
    assert results[0] == results[1]
    engine.close()
    assert not [t for t in threading.enumerate() if t.name == "tiers"]


def keep(engine: Engine, prompt: list[int], tier: str, name: str = "book") -> Kept | None:
    """As a pod does it: compute the prompt, hand its pages over, let go of its blocks."""
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    run(engine, Request(name, prompt, sampling, export=True, keep=Keep(name, tier)), patient=True)
    while not engine.keeping.offered(name):
        time.sleep(0.001)
    engine.release(name)
    assert engine.tiers is not None
    told: list[Kept | None] = []
    engine.tiers.kept(name, told.append)
    until(lambda: bool(told))
    return told[0]


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("threaded", [False, True])
def test_what_is_kept_outlives_other_prompts_and_a_full_queue(
    make_engine: MakeEngine, tmp_path: Path, tier: str, threaded: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tandem_runtime.kv.tiers.cache._BACKLOG_PAGES", 2)
    jobs = JobThread() if threaded else Inline()
    made = cache(6 if tier == "memory" else 0, tmp_path if tier == "disk" else None, jobs)
    engine = make_engine(blocks=14, tiers=made, page_tokens=PAGE, max_batch_tokens=200)
    cold = run(make_engine(), ask("s", DOCUMENTS[0] + [9]))["s"]
    kept = keep(engine, DOCUMENTS[0], tier)
    assert kept is not None
    assert (kept.pages, kept.stored, kept.held_pages) == (5, 5, 5)
    for n in range(90):
        run(engine, ask(f"scan-{n}", [(n * 7 + i) % 97 for i in range(70)]), patient=True)
    before = engine.stats().cached_tokens
    assert run(engine, ask("s", DOCUMENTS[0] + [9]), patient=True)["s"] == cold
    assert engine.stats().cached_tokens - before == 160
    assert engine.tiers is not None
    engine.tiers.drop("book")
    told: list[Kept | None] = []
    engine.tiers.kept("book", told.append)
    until(lambda: bool(told))
    assert told == [None]
    engine.close()


def test_what_does_not_fit_a_tier_is_refused_and_served_all_the_same(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(tiers=cache(memory_pages=6), page_tokens=PAGE)
    assert keep(engine, DOCUMENTS[0], "memory") == Kept(5, 5, 5, 6)
    refused = keep(engine, DOCUMENTS[1], "memory", "other")
    assert refused is not None
    assert refused.refused
    assert keep(engine, DOCUMENTS[1], "memory") == Kept(4, 4, 4, 6)  # a name's pages are replaced


def test_blocks_that_are_pinned_outlive_other_prompts(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=24)
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    run(engine, Request("book", DOCUMENTS[0], sampling, export=True))
    keys = engine.keeping.pin("book")
    engine.release("book")
    for n in range(30):
        run(engine, ask(f"scan-{n}", [(n * 7 + i) % 97 for i in range(70)]), patient=True)
    assert engine.keeping.pinned_tokens(keys) == 160
    run(engine, ask("large", list(range(99)) * 3))  # a stream that runs has what it needs
    assert engine.keeping.pinned_tokens(keys) < 160
    engine.keeping.unpin(keys)
    engine.check_integrity()


def test_what_is_kept_after_a_drop_is_not_dropped(make_engine: MakeEngine) -> None:
    jobs = JobThread()
    engine = make_engine(tiers=cache(memory_pages=12, jobs=jobs), page_tokens=PAGE)
    assert keep(engine, DOCUMENTS[0], "memory") is not None
    held, letting_go = threading.Event(), threading.Event()
    jobs.put(lambda: (held.set(), letting_go.wait(20))[0], urgent=True)
    assert held.wait(20)
    assert engine.tiers is not None
    engine.tiers.drop("book")
    request = Request(
        "again", DOCUMENTS[1], Sampling(max_tokens=1), export=True, keep=Keep("book", "memory")
    )
    assert engine.add(request) is None  # its look-up is urgent, and waits behind the drop
    letting_go.set()
    while engine.has_work or engine.stats().waiting:
        engine.step()
    until(lambda: bool(engine.keeping.offered("again")))
    told: list[Kept | None] = []
    engine.tiers.kept("book", told.append)
    until(lambda: bool(told))
    assert told[0] is not None
    assert told[0].stored == 4
    engine.close()
