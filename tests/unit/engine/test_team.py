"""A step's team: all parts computed once, by whoever is there; a failed step lets the others go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kernels.compiled import pointer
from tandem_runtime.kernels.linear import linear_cpu, pack_linear
from tandem_runtime.kernels.team import MOST_PARTS, Kernel, Team, share
from tandem_runtime.protocol import Sampling

SAMPLING = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)


def _count(a, part, element):  # type: ignore[no-untyped-def]
    """Adds one to the part's counter; `a`: the counters, passes over the part before that."""
    counters = pointer(a[0], np.int64(0))
    total = 0
    for i in range(a[1]):
        total += i & part
    counters[part] += 1 if total >= 0 else 0


COUNT = Kernel(_count)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_is_computed_once(threads: int) -> None:
    team = Team(threads)
    for step in range(20):
        with team.step():
            for parts in (1, 2, 3, 64, 1000):
                counters = np.zeros(parts, np.int64)
                share(COUNT, torch.float32, parts, counters.ctypes.data, 100 * step)
                assert counters.tolist() == [1] * parts
    team.close()


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(AssertionError, match="parts"):
        share(COUNT, torch.float32, MOST_PARTS + 1, 0, 0)


@pytest.mark.parametrize("rows", [1, 7, 16, 33, 250])
def test_a_team_computes_the_same_bits(rows: int) -> None:
    random = torch.Generator().manual_seed(rows)
    packed = pack_linear(torch.randn(1000, 96, generator=random).bfloat16())
    x = torch.randn(rows, 96, generator=random).bfloat16()
    alone, team = linear_cpu(x, packed, 1000), Team(3)
    for _ in range(20):
        with team.step():
            assert torch.equal(linear_cpu(x, packed, 1000), alone)
    team.close()


def test_a_failed_step_lets_the_team_go() -> None:
    team = Team(3)
    with pytest.raises(MemoryError, match="no room"), team.step():
        raise MemoryError("no room")
    team.close()  # waits for its threads


def test_a_team_goes_on_after_a_failed_step(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(threads=2)
    runner: Any = engine._runner
    batch = Batch([7], [0], [64], [1], [1], [[1]], [SampleRow(0, 1, SAMPLING)])

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    before = runner.collect(runner.launch(batch))
    with monkeypatch.context() as patched:
        patched.setattr(runner, "_forward", fails)
        with pytest.raises(MemoryError, match="no room"):
            runner.launch(batch)
    assert runner.collect(runner.launch(batch)) == before


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
