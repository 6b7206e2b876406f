"""How much memory the KV cache takes, from what is left beside the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from tandem_runtime.config import DEFAULT_CPU_KV_BYTES, EngineConfig
from tandem_runtime.kv.layout import KvLayout

_STATM: Final = Path("/proc/self/statm")


def block_count(config: EngineConfig, layout: KvLayout, context_tokens: int) -> int:
    """Blocks of the pool, the scrap block included. Call with weights loaded and a step run.

    Never more than `max_running` streams of full context could use. With several ranks: what this
    one has room for; `layout` is of its share of the kv heads.

    Raises:
        ValueError: not even two blocks fit.
    """
    block_bytes = layout.token_bytes * config.block_tokens
    stated = config.stated
    tokens = config.kv_cache_tokens
    if tokens is None and config.kv_cache_bytes is None and stated is not None:
        tokens = stated.kv_capacity_tokens
    if tokens is not None:
        budget = (tokens // config.block_tokens + 1) * block_bytes
        what = f"kv_cache_tokens is {tokens}"
    elif config.kv_cache_bytes is not None:
        budget = config.kv_cache_bytes // config.tensor_parallel
        what = f"kv_cache_bytes is {config.kv_cache_bytes}{_shared(config)}"
    else:
        free, what = _free_bytes(config)
        budget = free * config.kv_cache_percent // 100
        what = f"{config.kv_cache_percent} % of {what}"
    if budget < 2 * block_bytes:
        raise ValueError(
            f"no room for a KV cache: {what}, but a block of {config.block_tokens} tokens takes "
            f"{block_bytes} bytes and at least two are needed; give the pod more memory"
        )
    most = config.max_running * -(-context_tokens // config.block_tokens) + 1
    return min(budget // block_bytes, most)


def _free_bytes(config: EngineConfig) -> tuple[int, str]:
    if config.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free, f"the {free} of {total} bytes of GPU memory that are free beside the weights"
    if config.memory_limit_bytes is None:
        free = DEFAULT_CPU_KV_BYTES // config.tensor_parallel
        return free, f"the {free} bytes taken without a memory limit"
    limit_bytes = config.memory_limit_bytes - config.memory_tier_bytes
    free = max(limit_bytes // config.tensor_parallel - resident_bytes(), 0)
    limit = f"{config.memory_limit_bytes}{_shared(config)}"
    return free, f"the {free} bytes left of the memory limit of {limit}"


def _shared(config: EngineConfig) -> str:
    ranks = config.tensor_parallel
    return f" for {ranks} ranks" if ranks > 1 else ""


def resident_bytes() -> int:
    """Memory of this process now: weights, libraries, activations."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
