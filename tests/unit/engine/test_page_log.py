"""Changes of pages, as readers of the log see them."""

from __future__ import annotations

import pytest
from hash_engine import hash_engine
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.contract import BLOCK_TOKENS, KV_PAGE_TOKENS
from tandem_runtime.engine.page_log import PageLog
from tandem_runtime.engine.sequence import Request
from tandem_runtime.gateway.pages import PagesHeld
from tandem_runtime.gateway.prompt_keys import PromptKeys
from tandem_runtime.page_events import PageEvents
from tandem_runtime.prefix import block_keys
from tandem_runtime.protocol import Sampling

PAGE_BLOCKS = KV_PAGE_TOKENS // BLOCK_TOKENS


def keys_of(joined: bytes) -> set[bytes]:
    return {joined[n : n + 16] for n in range(0, len(joined), 16)}


def key(n: int) -> bytes:
    return n.to_bytes(16, "little")


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.booleans()), max_size=80))
def test_a_reader_knows_what_is_held_whenever_it_reads(steps: list[tuple[int, bool, bool]]) -> None:
    log, held, reader = PageLog(most_changes=5), set(), PagesHeld()
    for n, gains, reads in [*steps, (0, True, True)]:
        (log.gained if gains else log.lost)(key(n))
        (held.add if gains else held.discard)(n)
        if reads:
            reader.apply("pod", log.since(*reader.position("pod")))
            blocks = [b for n in range(13) for b in [b"-" * 16] * (PAGE_BLOCKS - 1) + [key(n)]]
            for page in range(13):
                prompt = blocks[page * PAGE_BLOCKS : (page + 1) * PAGE_BLOCKS]
                told = reader.correct({}, PromptKeys(prompt, BLOCK_TOKENS), 0.0)["pod"]
                assert told == (KV_PAGE_TOKENS if page in held else 0)
            assert reader.pages == len(held)


def test_changes_are_told_once_and_a_gap_gives_all_pages() -> None:
    log = PageLog(most_changes=3)
    log.gained(key(1))
    log.gained(key(1))
    assert log.since(log.id, 0) == PageEvents(log.id, 1, gained=key(1))
    log.lost(key(1))
    log.gained(key(2))
    assert log.since(log.id, 1) == PageEvents(log.id, 3, gained=key(2), lost=key(1))
    assert log.since(log.id, 3) == PageEvents(log.id, 3)
    log.gained(key(3))
    for seq, name in ((0, log.id), (9, log.id), (-1, log.id), (4, "another")):
        told = log.since(name, seq)
        assert told.snapshot
        assert keys_of(told.gained) == {key(2), key(3)}


def test_keys_of_a_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        PageEvents("log", 1, gained=b"short")


def test_an_engine_tells_whole_pages_and_those_it_evicts() -> None:
    engine = hash_engine(blocks=40)

    def run(name: str, ids: list[int]) -> bytes:
        engine.add(Request(name, ids, Sampling(max_tokens=2, ignore_eos=True)))
        sequence = engine._scheduler.waiting[-1]
        while engine.has_work:
            engine.step()
        return block_keys(sequence.root, ids, BLOCK_TOKENS)[PAGE_BLOCKS - 1]

    first = run("a", [1] * (KV_PAGE_TOKENS + 40))
    told = engine.pages.since("", 0)
    assert keys_of(told.gained) == {first}
    second = run("b", [2] * (KV_PAGE_TOKENS + 140))
    third = run("c", [3] * (KV_PAGE_TOKENS + 140))
    told = engine.pages.since(told.log, told.seq)
    assert not told.snapshot
    assert first in keys_of(told.lost)
    assert third in keys_of(told.gained)
    assert second not in keys_of(told.gained) & keys_of(told.lost)
