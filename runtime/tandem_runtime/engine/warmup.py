"""The widest step an engine may take, run once before the KV cache is sized.

It brings libraries and kernels up, so that the first request does not wait for them, and shows how
much memory activations take: what is free afterwards is the cache's.
"""

from __future__ import annotations

from time import perf_counter

from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.flight import Runner
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.swap import Rates
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.protocol import Sampling


def run_widest_step(model: Decoder, layout: KvLayout, config: EngineConfig) -> None:
    """A prefill chunk of the whole token budget, then decodes of `max_running` streams."""
    tokens, block_tokens = config.batch_tokens, config.block_tokens
    blocks = -(-tokens // block_tokens)
    cache = KvCache(layout, blocks + 1, block_tokens, model.device)
    runner = TorchRunner(model, cache, config.max_running)
    runner.launch(_chunk(min(tokens, model.context_tokens), block_tokens))
    streams = config.max_running
    runner.launch(
        Batch(
            token_ids=[0] * streams,
            positions=[0] * streams,
            slots=[0] * streams,
            query_tokens=[1] * streams,
            context_tokens=[1] * streams,
            block_tables=[[1]] * streams,
            samples=[_sample(row) for row in range(streams)],
        )
    )


def measure_rates(runner: Runner, tokens: int, block_tokens: int) -> Rates:
    """What a token costs to compute and to copy, by a chunk of so many; nobody uses the pool yet.

    Each is done twice: the first time loads kernels and pins memory, which the second takes again.
    """
    chunk = _chunk(tokens, block_tokens)
    block_ids = chunk.block_tables[0]
    for _ in range(2):
        begun_s = perf_counter()
        runner.collect(runner.launch(chunk))
        computed_s = perf_counter()
        runner.write_kv(block_ids, 0, runner.read_kv(block_ids, 0, tokens))
        copied_s = perf_counter()
    return Rates((computed_s - begun_s) / tokens, (copied_s - computed_s) / 2 / tokens)


def _chunk(tokens: int, block_tokens: int) -> Batch:
    """One prompt in the pool's first blocks."""
    return Batch(
        token_ids=[0] * tokens,
        positions=list(range(tokens)),
        slots=list(range(block_tokens, block_tokens + tokens)),
        query_tokens=[tokens],
        context_tokens=[tokens],
        block_tables=[list(range(1, 1 + -(-tokens // block_tokens)))],
        samples=[_sample(tokens - 1)],
    )


def _sample(row: int) -> SampleRow:
    return SampleRow(row, position=1, sampling=Sampling(max_tokens=1, top_p=0.9, logprobs=0))
