"""From an `EngineConfig` to an engine that is ready to step."""

from __future__ import annotations

import gc

import torch

from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.warmup import run_widest_step
from tandem_runtime.kv.cache import DTYPES, KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.sizing import block_count
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.weights import open_weights


def build_engine(config: EngineConfig, *, prefix_secret: bytes = b"") -> Engine:
    """Load the model, size the KV cache, warm up.

    Args:
        config: what to load and how much memory to take.
        prefix_secret: the namespace's handoff secret, from which prefix keys are derived.

    Raises:
        ModelError: the weights cannot be served; the sentence says why.
        ValueError: the configuration and this machine do not fit (memory, device).
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device; use device cpu")
    torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(resolve_source(config.model_uri))
    shape = checkpoint.config
    context_tokens = shape.limit_context(config.max_context_tokens)
    device = torch.device(config.device)
    layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, config.dtype)
    with torch.inference_mode():
        weights = open_weights(checkpoint, DTYPES[config.dtype])
        model = Decoder(shape, weights, context_tokens, device)
        run_widest_step(model, layout, config)
        blocks = block_count(config, layout, context_tokens)
        cache = KvCache(layout, blocks, config.block_tokens, device)
        runner = TorchRunner(model, cache, config.max_running)
        runner.capture_graphs()
    scheduler = Scheduler(
        BlockPool(blocks),
        block_tokens=config.block_tokens,
        max_batch_tokens=config.batch_tokens,
        max_running=config.max_running,
        prefix_caching=config.prefix_caching,
    )
    # Weights live as long as the process: the collector need not walk them again.
    gc.collect()
    gc.freeze()
    return Engine(
        scheduler,
        runner,
        layout=layout,
        layout_hash=layout.hash(checkpoint.digest()),
        vocab_size=shape.vocab_size,
        max_context_tokens=context_tokens,
        eos_token_ids=frozenset(shape.eos_token_ids),
        prefix_secret=prefix_secret,
    )
