"""What decode pods receive and generate comes back: the next turn of a conversation, from tiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers import following
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Tier
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Job
from tandem_runtime.kv.tiers.remote import RemoteTier
from tandem_runtime.prefix import block_keys, root_key, token_bytes
from tandem_runtime.protocol import Sampling

MakeEngine = Callable[..., Engine]
PAGE = 32
PROMPT = [7, 11, 13, 17, 19] * 14
"""70 tokens: two pages and a little."""
OUTPUT = 40
"""Of the 110 tokens all but the last are computed: three pages."""
QUESTION = [5, 3, 2] * 3


class Queued:
    """Jobs that run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def put(self, job: Job, *, urgent: bool = False) -> None:
        self.jobs.append(job)

    def later(self, delay_s: float, job: Job) -> None: ...

    def run(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()

    def close(self) -> None:
        self.run()


class Kept:
    """A `Store` in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, names: Any) -> list[bytes | None]:
        return [self.values.get(name) for name in names]

    def put(self, records: Any) -> None:
        self.values.update(records)

    def close(self) -> None: ...


def tiers(
    jobs: Queued, memory_pages: int = 0, disk: Path | None = None, store: Kept | None = None
) -> Callable[[KvLayout, bytes], TierCache]:
    def make(layout: KvLayout, layout_hash: bytes) -> TierCache:
        size = layout.token_bytes * PAGE
        known: dict[str, Any] = {
            "layout_hash": layout_hash,
            "page_bytes": size,
            "page_tokens": PAGE,
        }
        own: list[Tier] = []
        if memory_pages:
            own.append(HostTier(memory_pages * size, page_bytes=size))
        if disk is not None:
            own.append(DiskTier(disk, 60 * size, segment_bytes=6 * size, **known))
        remote = None if store is None else (RemoteTier(store, **known), jobs)
        return TierCache(own, jobs, page_tokens=PAGE, compute_s=1.0, remote=remote)

    return make


def ask(name: str, prompt: list[int], **changes: Any) -> Request:
    sampling = Sampling(max_tokens=OUTPUT, temperature=0.8, seed=3, logprobs=1, ignore_eos=True)
    return Request(name, prompt, sampling, **changes)


def run(engine: Engine, jobs: Queued | None = None) -> list[SampledToken]:
    """To the end of what is in it; the jobs run beside where they are given."""
    tokens = []
    while engine.has_work or (jobs and jobs.jobs):
        if jobs:
            jobs.run()
        tokens += [s.token for s in engine.step().streams if s.token is not None]
        engine.check_integrity()
    return tokens


def handed_over(prefill: Engine, decode: Engine, request: Request) -> SampledToken:
    """Its prompt is computed on one engine and runs on the other; the first token."""
    asked = Request(request.request_id, request.prompt_ids, request.sampling, export=True)
    assert prefill.add(asked) is None
    (first,) = run(prefill)
    assert decode.expect(request) is None
    known = len(request.prompt_ids)
    assert decode.grant(request.request_id, known) is not None
    payload = bytes(prefill.read_kv(request.request_id, 0, known))
    decode.write_kv(request.request_id, 0, payload)
    decode.start_decode(request.request_id, first)
    prefill.release(request.request_id)
    return first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overlaps", [False, True])
def test_the_next_turn_from_a_decode_pods_pages_equals_the_one_computed_cold(
    make_engine: MakeEngine, tmp_path: Path, dtype: str, overlaps: bool
) -> None:
    jobs = Queued()
    decode = make_engine(
        dtype=dtype, overlaps=overlaps, tiers=tiers(jobs, disk=tmp_path), page_tokens=PAGE
    )
    first = handed_over(make_engine(dtype=dtype), decode, ask("s", PROMPT))
    output = [first, *run(decode, jobs)]
    cold = make_engine(dtype=dtype, prefix_caching=False)
    cold.add(ask("s", PROMPT))
    assert output == run(cold)
    decode.close()
    # A pod that knows nothing but what the decode pod left on disk.
    turn = [*PROMPT, *(token.token_id for token in output), *QUESTION]
    jobs = Queued()
    prefill = make_engine(dtype=dtype, tiers=tiers(jobs, disk=tmp_path), page_tokens=PAGE)
    prefill.add(ask("turn", turn))
    cold.add(ask("turn", turn))
    assert run(prefill, jobs) == run(cold)
    assert prefill.stats().cached_tokens == 3 * PAGE
    assert prefill.tiers is not None
    assert prefill.tiers.hit_tokens == {("disk", "default"): 3 * PAGE}
    assert prefill.tiers.decoded_hit_tokens == {"disk": PAGE}, "the third page is of decode steps"
    prefill.close()


def test_pages_are_kept_while_the_stream_runs(make_engine: MakeEngine) -> None:
    jobs = Queued()
    decode = make_engine(tiers=tiers(jobs, memory_pages=9), page_tokens=PAGE)
    handed_over(make_engine(), decode, ask("s", PROMPT))
    assert decode.tiers is not None
    (memory,) = decode.tiers.tiers
    decode.step()
    jobs.run()
    assert memory.counters.stored_pages == 2, "what came from the prefill pod"
    for _ in range(OUTPUT // 2 + 8):
        decode.step()
        jobs.run()
    assert decode.has_work
    assert memory.counters.stored_pages == 3
    decode.abort("s")
    decode.close()


def test_what_a_pod_generates_from_a_prompt_of_its_own_is_kept_once(
    make_engine: MakeEngine,
) -> None:
    jobs = Queued()
    engine = make_engine(tiers=tiers(jobs, memory_pages=9), page_tokens=PAGE, blocks=20)
    for prompt in (PROMPT, PROMPT[:5]):
        assert engine.add(ask(str(len(prompt)), prompt)) is None
        run(engine, jobs)
    assert engine.tiers is not None
    (memory,) = engine.tiers.tiers
    # Of the short one 44 tokens are computed.
    assert memory.counters.stored_pages == memory.policy.resident_pages == 3 + 1


def test_what_has_left_the_accelerator_meanwhile_is_not_kept(make_engine: MakeEngine) -> None:
    jobs = Queued()
    decode = make_engine(tiers=tiers(jobs, memory_pages=9), page_tokens=PAGE, blocks=10)
    handed_over(make_engine(), decode, ask("s", PROMPT))
    run(decode)
    handed_over(make_engine(), decode, ask("other", [2, 9] * 50))  # needs the other's blocks
    run(decode)
    jobs.run()
    assert decode.tiers is not None
    (memory,) = decode.tiers.tiers
    assert memory.policy.resident_pages == memory.counters.stored_pages == 4


def test_a_tier_that_lags_gets_no_more_than_fits_the_queue(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MOST_FILLS", 1)
    monkeypatch.setattr(following, "MOST_PAGES", 1)
    jobs = Queued()
    decode = make_engine(tiers=tiers(jobs, memory_pages=9), page_tokens=PAGE)
    handed_over(make_engine(), decode, ask("s", PROMPT))
    run(decode)  # its two pages wait, the third is passed over, and of the two one is read
    jobs.run()
    assert decode.tiers is not None
    (memory,) = decode.tiers.tiers
    assert memory.policy.resident_pages == memory.counters.stored_pages == 1


def test_the_remote_tier_is_sent_what_the_prefill_pod_does_not_have(
    make_engine: MakeEngine,
) -> None:
    jobs, store = Queued(), Kept()
    prefill = make_engine(tiers=tiers(jobs, store=store), page_tokens=PAGE)
    decode = make_engine(tiers=tiers(jobs, store=store), page_tokens=PAGE)
    assert prefill.add(ask("s", PROMPT, export=True)) is None
    jobs.run()
    (first,) = run(prefill, jobs)
    prefills = set(store.values)
    assert len(prefills) == 2
    assert decode.expect(ask("s", PROMPT)) is None
    assert decode.grant("s", len(PROMPT)) is not None
    decode.write_kv("s", 0, bytes(prefill.read_kv("s", 0, len(PROMPT))))
    decode.start_decode("s", first)
    ids = [first.token_id, *(token.token_id for token in run(decode, jobs))]
    assert len(store.values) == 3
    assert decode.tiers is not None
    assert decode.tiers.tiers[0].counters.stored_pages == 1
    turn = ask("turn", [*PROMPT, *ids, *QUESTION])
    other = make_engine(tiers=tiers(jobs, store=store), page_tokens=PAGE)
    cold = make_engine()
    other.add(turn), cold.add(turn)
    assert run(other, jobs) == run(cold)
    assert other.tiers is not None
    assert other.tiers.decoded_hit_tokens == {"remote": PAGE}


def test_where_nothing_can_be_read_beside_steps_nothing_is_evicted_for_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with several ranks."""
    monkeypatch.setattr("tandem_runtime.engine.lending.Lending.possible", False)
    jobs = Queued()
    decode = make_engine(tiers=tiers(jobs, memory_pages=9), page_tokens=PAGE)
    handed_over(make_engine(), decode, ask("s", PROMPT))
    run(decode, jobs)
    assert decode.tiers is not None
    assert decode.tiers.tiers[0].policy.resident_pages == 0


def test_an_accelerators_page_that_is_lent_says_what_computed_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(ask("s", PROMPT))
    ids = [*PROMPT, *(token.token_id for token in run(engine))]
    keys = block_keys(root_key(engine.layout_hash, b"", "default", ""), ids, 16)
    for page, decoded in enumerate((False, False, True)):
        span = slice(page * PAGE, (page + 1) * PAGE)
        lent = engine.lending.read(keys[2 * page : 2 * page + 2], token_bytes(ids[span]))
        assert lent is not None
        assert lent.decoded == decoded
