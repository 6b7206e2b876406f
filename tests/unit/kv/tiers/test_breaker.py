from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.kv.tiers.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=50))
def test_pauses_double_up_to_a_bound_and_end_with_a_success(
    calls: list[tuple[float, bool]],
) -> None:
    breaker, now_s, pause_s, until_s = Breaker(), 0.0, 0.0, 0.0
    for wait_s, works in calls:
        now_s += wait_s
        assert breaker.allows(now_s) == (now_s >= until_s)
        if not breaker.allows(now_s):
            continue
        if works:
            breaker.succeeded()
            pause_s = until_s = 0.0
        else:
            breaker.failed(now_s)
            pause_s = min(2 * pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
            until_s = now_s + pause_s
        assert breaker.failing == (not works)
