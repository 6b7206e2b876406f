"""Index lists of a batch."""

from __future__ import annotations

from tandem_runtime.engine.batch import Work, build_batch
from tandem_runtime.engine.sequence import Request, Sequence
from tandem_runtime.protocol import Sampling


def sequence(tokens: list[int], blocks: list[int], computed: int) -> Sequence:
    made = Sequence(Request("s", tokens, Sampling(max_tokens=4, seed=3, top_p=0.5)), 0, b"root")
    made.block_ids, made.computed_tokens = blocks, computed
    return made


def test_rows_slots_and_samples_of_a_mixed_step() -> None:
    prefill = sequence([10, 11, 12, 13, 14, 15], [7, 3], 2)
    decode = sequence([20, 21, 22, 23, 24], [5, 9], 4)
    batch, works = build_batch([Work(prefill, 2, 3), Work(decode, 4, 1)], 4)
    assert [work.sequence for work in works] == [decode, prefill]
    assert batch.token_ids == [24, 12, 13, 14]
    assert batch.positions == [4, 2, 3, 4]
    assert batch.slots == [9 * 4 + 0, 7 * 4 + 2, 7 * 4 + 3, 3 * 4 + 0]
    assert batch.query_tokens == [1, 3]
    assert batch.context_tokens == [5, 5]
    assert batch.block_tables == [[5, 9], [7, 3]]
    assert [(s.row, s.position, s.sampling) for s in batch.samples] == [
        (0, 5, decode.request.sampling)
    ]


def test_a_chunk_that_reaches_the_last_known_token_samples() -> None:
    batch, _ = build_batch([Work(sequence([1, 2, 3], [4], 0), 0, 3)], 4)
    assert [(s.row, s.position) for s in batch.samples] == [(2, 3)]


def test_a_resumed_stream_samples_at_its_absolute_position() -> None:
    request = Request("s", [1, 2], Sampling(max_tokens=9), output_ids=[3, 4, 5])
    resumed = Sequence(request, 0, b"root")
    resumed.block_ids = [1, 2]
    batch, _ = build_batch([Work(resumed, 0, 5)], 4)
    assert batch.samples[0].position == 5
