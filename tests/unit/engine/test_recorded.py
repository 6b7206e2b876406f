"""Decode steps that are replayed equal those that Python calls, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.recorded import RecordedSteps
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv.cache import DTYPES, KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.protocol import Sampling

from benchmarks.gpu.model import TINY, RandomWeights

CPU = torch.device("cpu")
BLOCKS, MAX_RUNNING = 60, 5
SHAPE = replace(TINY, layers=5)
"""Enough for memory of earlier layers to be taken again."""
EXPERTS: dict[str, Any] = {"experts": 4, "experts_per_token": 2}


def make_runner(
    config: ModelConfig = SHAPE,
    dtype: str = "float32",
    kv: str = "",
    weights: str = "none",
    **options: Any,
) -> TorchRunner:
    torch.manual_seed(0)
    given = RandomWeights(config, CPU, DTYPES[dtype])
    model = Decoder(config, given, config.context_tokens, CPU, quantization=weights)
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, kv or dtype)
    runner = TorchRunner(model, KvCache(layout, BLOCKS, 16, CPU), MAX_RUNNING, **options)
    runner.capture_graphs()
    return runner


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of the steps that are replayed; each is compared."""
    rows = []
    replay = RecordedSteps.replay

    def compared(steps: RecordedSteps, batch: Any, step: Any) -> torch.Tensor | None:
        logits = replay(steps, batch, step)
        if logits is not None:
            rows.append(batch.rows)
            assert torch.equal(logits, RUNNERS[-1]._forward(batch, step))
        return logits

    monkeypatch.setattr(RecordedSteps, "replay", compared)
    yield rows
    RUNNERS.clear()


RUNNERS: list[TorchRunner] = []


def generate(runner: TorchRunner) -> None:
    """Streams of ragged lengths that come and go, while long prompts are computed in chunks."""
    RUNNERS.append(runner)
    engine = Engine(
        Scheduler(BlockPool(BLOCKS), block_tokens=16, max_batch_tokens=64, max_running=MAX_RUNNING),
        runner,
        layout=KvLayout(1, 1, 1, "float32"),
        layout_hash=b"",
        vocab_size=TINY.vocab_size,
        max_context_tokens=512,
        eos_token_ids=frozenset(),
    )
    for index, length in enumerate((3, 150, 17, 1, 5, 2, 40)):
        sampling = Sampling(4 + 3 * index, temperature=0.7 * (index % 2), seed=index)
        prompt = [(7 * index + 3 * n) % 101 for n in range(length)]
        engine.add(Request(str(index), prompt, sampling))
    while engine.has_work:
        engine.step()
    runner.close()


@pytest.mark.parametrize(
    ("dtype", "weights", "options"),
    [
        ("float32", "none", {}),
        ("bfloat16", "none", {"threads": 3}),
        ("bfloat16", "int4", {}),
        ("bfloat16", "none", {"overlaps": True}),
        ("bfloat16", "none", {"config": replace(SHAPE, qk_norm=True)}),
    ],
)
def test_logits_are_the_same(
    replayed: list[int], dtype: str, weights: str, options: dict[str, Any]
) -> None:
    generate(make_runner(dtype=dtype, weights=weights, **options))
    assert len(replayed) > 15
    assert {1, 3, 5} <= set(replayed)
    assert all(replayed.count(rows) > 1 for rows in (1, 5)), "recorded, and replayed"


@pytest.mark.parametrize(
    "more", [{"weights": "int8"}, {"kv": "fp8"}, {"config": replace(SHAPE, **EXPERTS)}]
)
def test_what_torch_computes_is_not_recorded(more: dict[str, Any]) -> None:
    runner = make_runner(dtype="bfloat16", **more)
    assert runner._graphs is None
    generate(runner)


def test_a_step_that_failed_is_recorded_anew(
    replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner()
    layer, calls = Decoder.layer, iter(range(1000))

    def fails_once(model: Decoder, index: int, *rest: Any) -> torch.Tensor:
        if isinstance(runner._graphs, RecordedSteps) and next(calls) == 3:
            raise MemoryError("no room")
        return layer(model, index, *rest)

    batch = Batch([7], [0], [64], [1], [1], [[4]], [SampleRow(0, 1, Sampling(1))])
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "layer", fails_once)
        with pytest.raises(MemoryError, match="no room"):
            runner.launch(batch)
    RUNNERS.append(runner)
    for _ in range(3):
        runner.launch(batch)
    assert replayed == [1, 1, 1]
