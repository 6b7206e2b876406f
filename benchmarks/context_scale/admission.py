"""What admitting contexts of 1,000,000 tokens costs a real engine's thread.

The model has one layer, so that a page is small and there is memory for several such contexts; how
long a page takes is measured elsewhere (context_cache). Their pages are in the memory tier, as they
are after a first request.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from prometheus_client import CollectorRegistry
from tandem_runtime.checkpoint.tiny import SHAPE, random_weights, write_checkpoint
from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, StreamOutput
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.prefix import KEY_BYTES, block_keys, compact, root_key, token_bytes
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.metrics import PodMetrics

from benchmarks.context_scale.hashing import TOKENS
from benchmarks.fleet import note

WARM_UP: Final = "warm-up"
TENANTS: Final = (WARM_UP, "a", "b", "c")
"""Each has a context of his own. What comes for the first time is not counted."""
_VOCABULARY: Final = 128
_ROOM_TOKENS: Final = 4096
_STEPS: Final = 100
"""Of the other stream, before the prompt comes."""


@dataclass
class Admissions:
    """Seconds of the engine's thread."""

    add: list[float] = field(default_factory=list)
    """`Engine.add`, of each prompt."""
    add_cpu: list[float] = field(default_factory=list)
    """The same without what other programs took of the machine meanwhile."""
    waits: list[float] = field(default_factory=list)
    """Of steps for pages of tiers, as `tandem_tier_loading_seconds` has them."""
    waits_cpu: list[float] = field(default_factory=list)
    """Likewise."""
    below_2_ms: float = 0.0
    """Of the waits, by the histogram's own buckets."""
    alone: list[float] = field(default_factory=list)
    """Steps of another stream, before."""
    looked_up: list[float] = field(default_factory=list)
    """The same while the prompt is hashed and looked up."""
    answered: list[float] = field(default_factory=list)
    """From `add` to the first token."""


def measure() -> Admissions:
    found = Admissions()
    registry = CollectorRegistry()
    metrics = PodMetrics(registry, "one-layer")
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(Path(folder))
    chance = random.Random(1)
    ids = [chance.randrange(3, _VOCABULARY) for _ in range(TOKENS)]
    for tenant in TENANTS:
        _fill(engine, tenant, ids)
    begun_cpu_s = 0.0
    before_step = engine._tiered.before_step

    def cpu_counted() -> None:
        nonlocal begun_cpu_s
        begun_cpu_s = time.thread_time()
        before_step()

    def observe(seconds: float) -> None:
        metrics.observe_loading(seconds)
        found.waits.append(seconds)
        found.waits_cpu.append(time.thread_time() - begun_cpu_s)

    engine._tiered.before_step = cpu_counted  # type: ignore[method-assign]
    for tenant in TENANTS:
        if tenant != WARM_UP:
            engine.observe_loading(observe)
        _ask(engine, tenant, ids, Admissions() if tenant == WARM_UP else found)
        note(f"a context of {TOKENS:,} tokens is admitted ({tenant})")
    engine.close()
    labels = {"model_name": "one-layer", "engine": "0"}
    name = "tandem_tier_loading_seconds"
    below = registry.get_sample_value(f"{name}_bucket", labels | {"le": "0.002"})
    count = registry.get_sample_value(f"{name}_count", labels)
    assert below is not None
    assert count
    found.below_2_ms = below / count
    return found


def _engine(folder: Path) -> Engine:
    shape = {
        **SHAPE,
        "num_hidden_layers": 1,
        "vocab_size": _VOCABULARY,
        "eos_token_id": 2,
        "max_position_embeddings": TOKENS + _ROOM_TOKENS,
    }
    write_checkpoint(folder, shape, random_weights(shape, 0), torch.bfloat16)
    config = EngineConfig(
        f"file://{folder}",
        threads=2,
        kv_cache_tokens=TOKENS + _ROOM_TOKENS,
        memory_tier_bytes=len(TENANTS) * (TOKENS + _ROOM_TOKENS) * 128,
    )
    return build_engine(config)


def _fill(engine: Engine, tenant: str, ids: list[int]) -> None:
    """Its tier has these pages, whatever is in them."""
    assert engine.tiers is not None
    (tier,) = engine.tiers.tiers
    keys = block_keys(root_key(engine.layout_hash, b"", tenant, ""), ids, KV_PAGE_TOKENS)
    payload, parent = bytes(engine.layout.token_bytes * KV_PAGE_TOKENS), bytes(KEY_BYTES)
    if len(tier.use(tenant, keys)) != len(keys):
        raise RuntimeError("the memory tier does not take the whole context")
    for page, key in enumerate(keys):
        tokens = token_bytes(ids[page * KV_PAGE_TOKENS : (page + 1) * KV_PAGE_TOKENS])
        tier.store(Page(key, parent, tokens, payload))
        parent = key


def _ask(engine: Engine, tenant: str, ids: list[int], found: Admissions) -> None:
    """A question of ten tokens to the context, while another stream is decoded."""
    assert engine.tiers is not None
    looked_up = threading.Event()
    long = Sampling(max_tokens=_ROOM_TOKENS // 2, temperature=0.0, ignore_eos=True)
    engine.add(Request("beside", range(3, 13), long))
    found.alone += [_step(engine)[0] for _ in range(_STEPS)]
    engine.tiers.wake = looked_up.set
    prompt = compact([*ids, *range(3, 13)])  # as a pod does before it asks the engine's thread
    request = Request(tenant, prompt, Sampling(max_tokens=2, ignore_eos=True), tenant=tenant)
    begun_s, begun_cpu_s = time.perf_counter(), time.thread_time()
    engine.add(request)
    found.add_cpu.append(time.thread_time() - begun_cpu_s)
    found.add.append(time.perf_counter() - begun_s)
    while not looked_up.is_set():
        found.looked_up.append(_step(engine)[0])
    first = None
    while first is None:
        _, outputs = _step(engine)
        first = next((o for o in outputs if o.request_id == tenant), None)
    found.answered.append(time.perf_counter() - begun_s)
    if first.cached_tokens != TOKENS // KV_PAGE_TOKENS * KV_PAGE_TOKENS:
        raise RuntimeError(f"{first.cached_tokens} tokens came from the tier")
    engine.abort("beside")
    while engine.has_work:
        _step(engine)


def _step(engine: Engine) -> tuple[float, tuple[StreamOutput, ...]]:
    """How long it took, and what it gave."""
    begun_s = time.perf_counter()
    output = engine.step()
    return time.perf_counter() - begun_s, output.streams
