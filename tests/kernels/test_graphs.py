"""Decode steps by graphs equal those without: padding, raggedness, and a buffer used again.

Without a GPU nothing is captured: replaying computes the same on the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tandem_runtime.engine.batch import Work, build_batch
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.graphs import DecodeGraphs, most_splits, row_counts
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Request, Sequence
from tandem_runtime.kernels.attention_plan import SPLIT_TOKENS, Step
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.protocol import Sampling

from benchmarks.gpu.model import TINY, RandomWeights

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
"""The interpreter's, where noise is hashed."""
MAX_RUNNING = 5
BLOCKS = 60


class Replayed:
    """In place of a CUDA graph."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class UncapturedGraphs(DecodeGraphs):
    def _capture(self, rows: int, pool: Any) -> Any:
        return Replayed(partial(self._forward, rows))


def make_runner(device: torch.device) -> TorchRunner:
    torch.manual_seed(0)
    config = replace(TINY, layers=1)
    weights = RandomWeights(config, torch.device("cpu"), torch.float32)
    model = Decoder(config, weights, config.context_tokens, device)
    layout = KvLayout(config.layers, TINY.kv_heads, TINY.head_dim, "float32")
    cache = KvCache(layout, BLOCKS, 16, device)
    return TorchRunner(model, cache, MAX_RUNNING, overlaps=True)


def capture(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the steps that are replayed from here on."""
    if runner._device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        runner._graphs = UncapturedGraphs(runner._model, runner._cache, runner._chosen)
    else:
        with torch.inference_mode():
            runner.capture_graphs()
    replayed = []
    graphs = runner._graphs
    assert graphs is not None
    replay = graphs.replay

    def watched(batch: Any, step: Any) -> torch.Tensor | None:
        logits = replay(batch, step)
        if logits is not None:
            replayed.append(batch.rows)
        return logits

    monkeypatch.setattr(graphs, "replay", watched)
    return replayed


def generate(runner: TorchRunner) -> dict[str, list[int]]:
    """Streams of ragged lengths that come and go, greedy and seeded."""
    engine = Engine(
        Scheduler(BlockPool(BLOCKS), block_tokens=16, max_batch_tokens=300, max_running=5),
        runner,
        layout=KvLayout(1, 1, 1, "float32"),
        layout_hash=b"",
        vocab_size=TINY.vocab_size,
        max_context_tokens=512,
        eos_token_ids=frozenset(),
    )
    long = 255 if runner._device.type == "cuda" else 30  # the interpreter is slow
    for index, length in enumerate((3, long, 17, 1, 5, 2)):
        sampling = Sampling(2 + index, temperature=0.7 * (index % 2), seed=index)
        prompt = [(7 * index + 3 * n) % 101 for n in range(length)]
        engine.add(Request(str(index), prompt, sampling))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for stream in engine.step().streams:
            if stream.token is not None:
                tokens.setdefault(stream.request_id, []).append(stream.token.token_id)
    return tokens


def test_replayed_steps_equal_those_without_graphs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_runner(device)
    expected = generate(plain)
    graphed = make_runner(device)
    replayed = capture(graphed, monkeypatch)
    assert generate(graphed) == expected
    assert len(replayed) > 5
    assert {1, 3} <= set(replayed), "padded steps and full ones"


def test_a_step_with_more_splits_than_a_graph_has_room_for_goes_without(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(device)
    capture(runner, monkeypatch)
    graphs = runner._graphs
    assert graphs is not None
    room = most_splits(MAX_RUNNING, runner._cache, 8192)
    assert room == BLOCKS * 16 // SPLIT_TOKENS + MAX_RUNNING
    # Streams that share a prefix count it each.
    table = list(range(1, BLOCKS))
    sequence = Sequence(Request("", [0] * len(table) * 16, Sampling(1)), 0, b"")
    sequence.block_ids = table
    work = Work(sequence, sequence.known_tokens - 1, 1)
    batch, _ = build_batch([work] * MAX_RUNNING, 16)
    shared = Step([1] * 5, [len(table) * 16] * 5, [table] * 5, 16)
    assert graphs.replay(batch, shared) is None


def test_row_counts_end_at_what_runs_at_most() -> None:
    assert row_counts(1) == [1]
    assert row_counts(5) == [1, 2, 4, 5]
    assert row_counts(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert row_counts(1000)[-1] == 256
