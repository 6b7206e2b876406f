"""A step's parts: every row in one of them, none empty, each as a batch of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.parts import Part, split
from tandem_runtime.engine.sequence import Request
from tandem_runtime.protocol import Sampling

SAMPLING = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
sequences = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 3000), st.booleans()), min_size=1, max_size=12
)


def make_batch(shapes: list[tuple[int, int, bool]]) -> Batch:
    """Of (rows, tokens seen before them, whether the last one samples)."""
    batch = Batch([], [], [], [], [], [], [])
    for index, (rows, seen, samples) in enumerate(sorted(shapes, key=lambda shape: shape[0] > 1)):
        first = batch.rows
        batch.token_ids.extend(range(first, first + rows))
        batch.positions.extend(range(seen, seen + rows))
        batch.slots.extend(range(1000 + first, 1000 + first + rows))
        batch.query_tokens.append(rows)
        batch.context_tokens.append(seen + rows)
        batch.block_tables.append([index + 1] * -(-(seen + rows) // 16))
        if samples:
            batch.samples.append(SampleRow(first + rows - 1, seen + rows, SAMPLING))
    return batch


def rows_of(batch: Batch) -> list[tuple[int, int, int, int, int]]:
    """Of each: id, position, slot, block table's first entry, tokens it sees."""
    found, row = [], 0
    for count, context, table in zip(
        batch.query_tokens, batch.context_tokens, batch.block_tables, strict=True
    ):
        for index in range(count):
            sees = context - count + index + 1
            columns = (batch.token_ids[row], batch.positions[row], batch.slots[row])
            found.append((*columns, table[0], sees))
            row += 1
    assert row == batch.rows
    return found


@given(shapes=sequences, count=st.integers(1, 5))
def test_parts_are_the_batch(shapes: list[tuple[int, int, bool]], count: int) -> None:
    batch = make_batch(shapes)
    parts = split(batch, count)
    assert 1 <= len(parts) <= count
    assert all(part.batch.rows for part in parts)
    assert [row for part in parts for row in rows_of(part.batch)] == rows_of(batch)
    ids = [part.batch.token_ids[s.row] for part in parts for s in part.batch.samples]
    assert ids == [batch.token_ids[s.row] for s in batch.samples]
    for before, part in pairwise(parts):
        last, first = rows_of(before.batch)[-1], rows_of(part.batch)[0]
        assert part.continues == (last[3] == first[3])
    assert not parts[0].continues


@given(shapes=sequences)
def test_parts_cost_about_the_same(shapes: list[tuple[int, int, bool]]) -> None:
    def cost(part: Part) -> int:
        return sum(1024 + position for position in part.batch.positions)

    parts = split(make_batch(shapes), 2)
    dearest = max(1024 + position for part in parts for position in part.batch.positions)
    assert len(parts) < 2 or abs(cost(parts[0]) - cost(parts[1])) <= 2 * dearest


def test_a_part_that_fails_holds_nobody_up(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(threads=2)
    runner: Any = engine._runner
    whole = runner._forward

    def first_part_fails(batch: Batch, *rest: Any) -> Any:
        if batch.positions[0] == 0:
            raise MemoryError("no room")
        return whole(batch, *rest)

    monkeypatch.setattr(runner, "_forward", first_part_fails)
    engine.add(Request("s", list(range(40)), SAMPLING))
    with pytest.raises(MemoryError, match="no room"):
        engine.step()


def test_a_step_copies_none_of_the_cache(make_engine: Callable[..., Engine]) -> None:
    def allocated_bytes(prompt_tokens: int) -> int:
        engine = make_engine(dtype="bfloat16")
        engine.add(Request("s", [7] * prompt_tokens, SAMPLING))
        engine.step()
        with torch.profiler.profile(profile_memory=True) as profile:
            assert engine.step().batch_tokens == 1
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events() or [])

    short, long = allocated_bytes(20), allocated_bytes(400)
    assert 0 < long <= 1.2 * short, f"{short} bytes at 20 tokens of context, {long} at 400"
