"""Preempted streams whose KV is kept on the host."""

from __future__ import annotations

import pytest
from ledger_engine import LAYOUT, ask, expected, make
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.swap import Rates, Swap


def crowded(**options: object) -> Engine:
    """Two streams of which the younger has to give way, in a pool of 6 blocks of 4 tokens."""
    engine = make(blocks=6, budget=16, caching=False, **options)  # type: ignore[arg-type]
    engine.add(ask("old", [1] * 7, max_tokens=12))
    engine.add(ask("young", [2] * 7, max_tokens=12))
    return engine


def run(engine: Engine) -> tuple[dict[str, list[int]], int]:
    """Every stream's tokens, and how many rows it took."""
    tokens: dict[str, list[int]] = {}
    rows = 0
    while engine.has_work:
        output = engine.step()
        engine.check_integrity()
        rows += output.batch_tokens
        for stream in output.streams:
            assert stream.token is not None
            tokens.setdefault(stream.request_id, []).append(stream.token.token_id)
    return tokens, rows


def swap_of(engine: Engine) -> Swap:
    swap = engine._scheduler.swap
    assert swap is not None
    return swap


def until_preempted(engine: Engine) -> None:
    while not engine.stats().preemptions:
        engine.step()


def test_a_copy_spares_computing_again() -> None:
    texts = {"old": expected([1] * 7, 12), "young": expected([2] * 7, 12)}
    swapped = crowded(swap_tokens=20)
    tokens, rows = run(swapped)
    assert tokens == texts
    assert swapped.stats().preemptions >= 1
    assert rows == 2 * (7 + 11), "each token was computed once"
    assert swap_of(swapped).held_bytes == 0
    tokens, rows = run(crowded())
    assert tokens == texts
    assert rows > 2 * (7 + 11)


@pytest.mark.parametrize(
    "options",
    [{"swap_tokens": 20, "rates": Rates(compute_s=2, copy_s=1)}, {"swap_tokens": 3}],
    ids=["recomputing is as cheap", "no room on the host"],
)
def test_nothing_is_kept_that_does_not_pay_or_fit(options: dict[str, object]) -> None:
    engine = crowded(**options)
    until_preempted(engine)
    assert swap_of(engine).held_bytes == 0
    assert run(engine)[0]["young"][-1] == expected([2] * 7, 12)[-1]


def test_an_aborted_stream_s_copy_goes_with_it() -> None:
    engine = crowded(swap_tokens=20)
    until_preempted(engine)
    assert swap_of(engine).held_bytes > 0
    assert engine.abort("young")
    assert swap_of(engine).held_bytes == 0
    engine.check_integrity()


def test_what_the_prefix_cache_still_has_is_not_copied_back() -> None:
    rates = Rates(compute_s=3, copy_s=1)
    assert rates.pays_back(kept_tokens=30, cached_tokens=19)
    assert not rates.pays_back(kept_tokens=30, cached_tokens=20)


def test_a_copy_that_has_become_dear_is_dropped() -> None:
    engine = make(blocks=6, budget=16, swap_tokens=40)
    engine.add(ask("old", [1] * 7, max_tokens=12))
    engine.add(ask("young", [2] * 7, max_tokens=12))
    until_preempted(engine)
    swap = swap_of(engine)
    assert 0 < swap.held_bytes <= 40 * LAYOUT.token_bytes, "kept although the cache has it, too"
    swap._rates = Rates(compute_s=1, copy_s=5)
    tokens, _ = run(engine)
    assert tokens["young"][-1] == expected([2] * 7, 12)[-1]
    assert swap.held_bytes == 0
