from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.gateway.journal import Journal
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, PrefillTarget, Sampling

REQUEST = GenerateRequest("s", 0, [1, 2, 3], Sampling(max_tokens=10, seed=7))
TARGET = PrefillTarget("p", "127.0.0.1", 7600)


def test_a_stream_that_moves_once() -> None:
    journal = Journal(REQUEST)
    first = journal.attempt(TARGET)
    assert (first.epoch, first.output_ids, first.prefill) == (0, [], TARGET)
    assert journal.take(GenerateEvent(0, token_ids=(5, 6)))
    journal.fail("d1", "it broke")
    second = journal.attempt(None)
    assert (second.epoch, second.output_ids, second.prefill) == (1, [5, 6], None)
    assert second.sampling.seed == 7
    assert not journal.take(GenerateEvent(0, token_ids=(9,))), "of the attempt that was given up"
    assert journal.take(GenerateEvent(1, token_ids=(7,), finish_reason="stop"))
    assert journal.output_ids == [5, 6, 7]
    assert journal.finished


def test_failures_count_in_a_row() -> None:
    journal = Journal(REQUEST)
    for _ in range(2):
        journal.attempt(None)
        journal.fail("d1", "no")
    assert (journal.failures, journal.begun, journal.avoid) == (2, False, {"d1"})
    journal.attempt(None)
    journal.take(GenerateEvent(2, token_ids=(1,)))
    assert (journal.failures, journal.begun) == (0, True)


@given(
    steps=st.lists(
        st.one_of(
            st.just("fail"),
            st.tuples(st.integers(-1, 1), st.lists(st.integers(0, 9), max_size=3)),
        ),
        max_size=30,
    )
)
def test_output_is_what_the_newest_attempts_sent(steps: list[object]) -> None:
    journal = Journal(REQUEST)
    journal.attempt(None)
    expected: list[int] = []
    for step in steps:
        if isinstance(step, tuple):
            behind, ids = step
            epoch = journal.epoch - behind
            journal.take(GenerateEvent(epoch, token_ids=tuple(ids)))
            expected += ids if behind == 0 else []
        else:
            journal.fail("d", "no")
            assert journal.attempt(None).output_ids == expected
    assert journal.output_ids == expected
