"""From an `EngineConfig` to an engine that is ready to step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from tandem_runtime.checkpoint.open import Checkpoint, open_checkpoint
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import KV_PAGE_TOKENS, pod_token
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.flight import Runner
from tandem_runtime.engine.pace import PacedRunner
from tandem_runtime.engine.probe import DeviceProbe
from tandem_runtime.engine.ranks import Followers, ParallelRunner, rank_device
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.swap import Rates, Swap
from tandem_runtime.engine.warmup import measure_rates, run_widest_step
from tandem_runtime.kv.cache import DTYPES, KvCache, pinned_bytes
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.sizing import block_count
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.contract import Tier
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Jobs, JobThread
from tandem_runtime.kv.tiers.peer import Peers
from tandem_runtime.kv.tiers.remote import RemoteTier
from tandem_runtime.kv.tiers.stores import open_store
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.parallel import ALONE, Ranks
from tandem_runtime.model.sharding import Sharding, check_fits
from tandem_runtime.model.weights import open_weights


def build_engine(
    config: EngineConfig,
    *,
    prefix_secret: bytes = b"",
    lost: Callable[[Exception], None] = lambda error: None,
) -> Engine:
    """Load the model, size the KV cache, warm up.

    Args:
        config: what to load and how much memory to take.
        prefix_secret: the namespace's handoff secret, from which prefix keys are derived.
        lost: called from another thread when a rank is gone, see `Followers`. The calling thread
            may be stuck in a step then.

    Raises:
        ModelError: the weights cannot be served; the sentence says why.
        ValueError: the configuration and this machine do not fit (memory, device).
        RankLost: a process of another rank ended.
    """
    _check_device(config)
    checkpoint = open_checkpoint(resolve_source(config.model_uri))
    shape = checkpoint.config
    context_tokens = shape.limit_context(config.max_context_tokens)
    check_fits(
        shape, config.tensor_parallel, checkpoint.form(config.weights, config.weights_exclude)
    )
    sharding = Sharding(shape, config.tensor_parallel)
    layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, config.kv_dtype)
    runner: Runner
    if sharding.size > 1:
        followers = Followers(config, lost)
        with followers.ended_on_error():
            own, blocks = build_runner(config, checkpoint, followers.join())
        runner = ParallelRunner(own, followers, sharding)
    else:
        own, blocks = build_runner(config, checkpoint, ALONE)
        runner = own
    if config.stated is not None:
        runner = PacedRunner(runner, config.stated)
    layout_hash = layout.hash(checkpoint.digest(), config.computed)
    chunk_tokens = min(config.batch_tokens, context_tokens, (blocks - 1) * config.block_tokens)
    rates = cache(lambda: measure_rates(runner, chunk_tokens, config.block_tokens))
    scheduler = Scheduler(
        BlockPool(blocks),
        block_tokens=config.block_tokens,
        max_batch_tokens=config.batch_tokens,
        max_running=config.max_running,
        prefix_caching=config.prefix_caching,
        swap=_swap(config, runner, layout, rates),
    )
    return Engine(
        scheduler,
        runner,
        layout=layout,
        layout_hash=layout_hash,
        vocab_size=shape.vocab_size,
        max_context_tokens=context_tokens,
        eos_token_ids=frozenset(shape.eos_token_ids),
        prefix_secret=prefix_secret,
        tiers=_tiers(config, layout, layout_hash, rates, prefix_secret),
        # What a paced pod pretends has no device.
        probe=own.probe if config.stated is None else None,
    )


def build_runner(
    config: EngineConfig, checkpoint: Checkpoint, ranks: Ranks
) -> tuple[TorchRunner, int]:
    """This rank's share of the model and of `blocks` KV blocks, which all ranks have room for."""
    torch.set_num_threads(1)  # a step's threads are the runner's
    context_tokens = checkpoint.config.limit_context(config.max_context_tokens)
    device = rank_device(config, ranks.rank)
    probe = DeviceProbe(device, ranks)
    with torch.inference_mode():
        weights = open_weights(checkpoint, DTYPES[config.dtype])
        model = Decoder(
            checkpoint.config,
            weights,
            context_tokens,
            device,
            ranks=ranks,
            quantization="none" if checkpoint.stored else config.weights,
            exclude=config.weights_exclude,
        )
        shape = model.config
        layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, config.kv_dtype)
        run_widest_step(model, layout, config)
        blocks = ranks.least(block_count(config, layout, context_tokens))
        cache = KvCache(layout, blocks, config.block_tokens, device)
        threads = config.threads if ranks.size == 1 else 1
        runner = TorchRunner(model, cache, config.max_running, threads=threads, probe=probe)
        runner.capture_graphs()
    # Weights live as long as the process: the collector need not walk them again.
    gc.collect()
    gc.freeze()
    return runner, blocks


def _swap(
    config: EngineConfig, runner: Runner, layout: KvLayout, rates: Callable[[], Rates]
) -> Swap | None:
    if not config.swap_capacity_bytes:
        return None
    return Swap(
        runner, rates(), token_bytes=layout.token_bytes, capacity_bytes=config.swap_capacity_bytes
    )


def _tiers(
    config: EngineConfig,
    layout: KvLayout,
    layout_hash: bytes,
    rates: Callable[[], Rates],
    secret: bytes,
) -> TierCache | None:
    page_bytes = layout.token_bytes * KV_PAGE_TOKENS
    tiers: list[Tier] = []
    if config.memory_tier_bytes:
        # What several ranks read is put together in memory that is not pinned.
        pinned = config.device == "cuda" and config.tensor_parallel == 1
        held_bytes = pinned_bytes(page_bytes) if pinned else page_bytes
        parts = config.memory_tier_tenants
        tiers.append(HostTier(config.memory_tier_bytes, page_bytes=held_bytes, tenants=parts))
    if config.disk_tier_bytes and config.disk_tier_dir:
        try:
            disk = DiskTier(
                Path(config.disk_tier_dir),
                config.disk_tier_bytes,
                layout_hash=layout_hash,
                page_bytes=page_bytes,
                page_tokens=KV_PAGE_TOKENS,
                tenants=config.disk_tier_tenants,
            )
        except OSError as error:
            raise ValueError(
                f"the disk tier cannot use {config.disk_tier_dir}: {error}; mount a folder there "
                "that this process may write to"
            ) from error
        tiers.append(disk)
    remote = _remote_tier(config, layout_hash, page_bytes)
    peers = _peers(config, layout_hash, page_bytes, secret)
    if not tiers and remote is None and peers is None:
        return None
    compute_s = rates().compute_s - rates().copy_s
    return TierCache(
        tiers,
        JobThread(),
        page_tokens=KV_PAGE_TOKENS,
        compute_s=compute_s,
        remote=remote,
        peers=peers,
    )


def _peers(
    config: EngineConfig, layout_hash: bytes, page_bytes: int, secret: bytes
) -> tuple[Peers, Jobs] | None:
    if not config.peer_tier:
        return None
    peers = Peers(
        pod_token(secret),
        layout_hash=layout_hash,
        page_bytes=page_bytes,
        page_tokens=KV_PAGE_TOKENS,
        block_tokens=config.block_tokens,
    )
    return peers, JobThread("peers")


def _remote_tier(
    config: EngineConfig, layout_hash: bytes, page_bytes: int
) -> tuple[Tier, Jobs] | None:
    if config.remote_tier is None:
        return None
    asked = config.remote_tier
    store = open_store(asked.uri, asked.credentials, ttl_s=asked.ttl_s, value_bytes=page_bytes)
    tier = RemoteTier(
        store, layout_hash=layout_hash, page_bytes=page_bytes, page_tokens=KV_PAGE_TOKENS
    )
    return tier, JobThread("remote tier")


def _check_device(config: EngineConfig) -> None:
    if config.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device; use device cpu")
    seen = torch.cuda.device_count()
    if config.tensor_parallel > seen:
        raise ValueError(
            f"tensor_parallel is {config.tensor_parallel}, but torch finds {seen} CUDA devices: "
            "give the pod a device for each rank"
        )
