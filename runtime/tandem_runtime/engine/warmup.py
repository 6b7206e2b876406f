"""The widest step an engine may take, run once before the KV cache is sized.

It brings libraries and kernels up, so that the first request does not wait for them, and shows how
much memory activations take: what is free afterwards is the cache's.
"""

from __future__ import annotations

from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.runner import TorchRunner
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
    table = list(range(1, blocks + 1))
    positions = list(range(min(tokens, model.context_tokens)))
    slots = [table[p // block_tokens] * block_tokens + p % block_tokens for p in positions]
    runner.launch(
        Batch(
            token_ids=[0] * len(positions),
            positions=positions,
            slots=slots,
            query_tokens=[len(positions)],
            context_tokens=[len(positions)],
            block_tables=[table],
            samples=[_sample(len(positions) - 1)],
        )
    )
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


def _sample(row: int) -> SampleRow:
    return SampleRow(row, position=1, sampling=Sampling(max_tokens=1, top_p=0.9, logprobs=0))
