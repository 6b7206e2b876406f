"""Engines around one small model, of any pool size and budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.swap import Rates, Swap
from tandem_runtime.kv.cache import DTYPES, KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.weights import open_weights

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(tiny_checkpoint: Callable[..., Path]) -> MakeEngine:
    """`make_engine(dtype, blocks, max_batch_tokens, max_running, ...)`."""
    checkpoint = open_checkpoint(tiny_checkpoint())
    device = torch.device("cpu")
    torch.set_num_threads(1)
    models: dict[str, Decoder] = {}

    def make(
        dtype: str = "float32",
        blocks: int = 200,
        max_batch_tokens: int = 512,
        max_running: int = 16,
        prefix_caching: bool = True,
        growth_reserve_tokens: int = 64,
        overlaps: bool = False,
        swap_bytes: int = 0,
        threads: int = 1,
        tiers: Callable[[KvLayout, bytes], TierCache] | None = None,
        page_tokens: int = KV_PAGE_TOKENS,
    ) -> Engine:
        shape = checkpoint.config
        if dtype not in models:
            weights = open_weights(checkpoint, DTYPES[dtype])
            models[dtype] = Decoder(shape, weights, shape.context_tokens, device)
        layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, dtype)
        cache = KvCache(layout, blocks + 1, 16, device)
        runner = TorchRunner(models[dtype], cache, max_running, overlaps=overlaps, threads=threads)
        rates = Rates(compute_s=3, copy_s=1)
        swap = Swap(runner, rates, token_bytes=layout.token_bytes, capacity_bytes=swap_bytes)
        layout_hash = layout.hash("tiny")
        return Engine(
            Scheduler(
                BlockPool(blocks + 1),
                block_tokens=16,
                max_batch_tokens=max_batch_tokens,
                max_running=max_running,
                prefix_caching=prefix_caching,
                growth_reserve_tokens=growth_reserve_tokens,
                swap=swap if swap_bytes else None,
                page_tokens=page_tokens,
            ),
            runner,
            layout=layout,
            layout_hash=layout_hash,
            vocab_size=shape.vocab_size,
            max_context_tokens=shape.context_tokens,
            eos_token_ids=frozenset(shape.eos_token_ids),
            tiers=tiers(layout, layout_hash) if tiers else None,
        )

    return make
