"""200 contexts of four tenants, on an engine with memory for 50 and disk for all.

Contexts of two pages; each tenant has a floor in memory. One of them asks as often as the others
together and hardly ever twice for the same, so that he would take all of it.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.config import EngineConfig
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.build import build_runner
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.model.parallel import ALONE
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.options import parse

from benchmarks.engine_cpu.players import THREADS
from benchmarks.fleet import MODEL_URI, note

TENANTS: Final = ("a", "b", "c", "flood")
CONTEXTS_EACH: Final = 50
CONTEXT_PAGES: Final = 2
MEMORY_CONTEXTS: Final = 50
FLOOR_CONTEXTS: Final = 8
FLOOR_PERCENT: Final = 100 * FLOOR_CONTEXTS // MEMORY_CONTEXTS
POOL_BYTES: Final = 64 << 20
"""Of the accelerator: two contexts and a half."""


class _NowJobs:
    """Jobs on the engine's thread: what a tier keeps does not depend on who runs when."""

    def put(self, job: Any, *, urgent: bool = False) -> None:
        job()

    def later(self, delay_s: float, job: Any) -> None: ...

    def close(self) -> None: ...


def asked(requests: int) -> list[tuple[str, int]]:
    """(tenant, context): three tenants ask by Zipf's law, the fourth goes round."""
    chance = random.Random(5)
    weights = [1 / (1 + n) for n in range(CONTEXTS_EACH)]
    found, turn = [], 0
    for _ in range(requests):
        if chance.random() < 0.5:
            found.append(("flood", turn % CONTEXTS_EACH))
            turn += 1
        else:
            (context,) = chance.choices(range(CONTEXTS_EACH), weights)
            found.append((chance.choice(TENANTS[:3]), context))
    return found


def _prompt(context: int) -> list[int]:
    chance = random.Random(context)
    return [chance.randrange(1000, 40_000) for _ in range(CONTEXT_PAGES * KV_PAGE_TOKENS)] + [7]


def _config(folder: Path, context_bytes: int) -> EngineConfig:
    """As a pod's command line says it."""
    flags = {
        "role": "both",
        "model-name": "smollm2",
        "model-uri": MODEL_URI,
        "threads": THREADS,
        "kv-cache-bytes": POOL_BYTES,
        "max-context-tokens": 1024,
        "memory-tier-size": MEMORY_CONTEXTS * context_bytes,
        "disk-tier-size": 3 * len(TENANTS) * CONTEXTS_EACH * context_bytes // 2,
        "disk-tier-dir": folder,
    }
    floors = [f"--memory-tier-tenant={FLOOR_PERCENT}..:{tenant}" for tenant in TENANTS]
    return parse([*(f"--{flag}={value}" for flag, value in flags.items()), *floors], {}).engine


def _engine(folder: Path) -> tuple[Engine, HostTier]:
    """As `build_engine` makes it, but its tiers' jobs run at once."""
    checkpoint = open_checkpoint(resolve_source(MODEL_URI))
    shape = checkpoint.config
    layout = KvLayout(shape.layers, shape.kv_heads, shape.head_dim, "bfloat16")
    size = layout.token_bytes * KV_PAGE_TOKENS
    config = _config(folder, CONTEXT_PAGES * size)
    runner, blocks = build_runner(config, checkpoint, ALONE)
    layout_hash = layout.hash(checkpoint.digest(), config.computed)
    memory = HostTier(config.memory_tier_bytes, page_bytes=size, tenants=config.memory_tier_tenants)
    disk = DiskTier(
        folder,
        config.disk_tier_bytes,
        layout_hash=layout_hash,
        page_bytes=size,
        page_tokens=KV_PAGE_TOKENS,
    )
    tiers = TierCache((memory, disk), _NowJobs(), page_tokens=KV_PAGE_TOKENS, compute_s=1.0)
    scheduler = Scheduler(
        BlockPool(blocks),
        block_tokens=config.block_tokens,
        max_batch_tokens=config.batch_tokens,
        max_running=config.max_running,
    )
    engine = Engine(
        scheduler,
        runner,
        layout=layout,
        layout_hash=layout_hash,
        vocab_size=shape.vocab_size,
        max_context_tokens=1024,
        eos_token_ids=frozenset(shape.eos_token_ids),
        tiers=tiers,
    )
    return engine, memory


def measure(requests: int) -> dict[str, Any]:
    """Pages by where they came from, for each tenant, and whether floors were kept."""
    with tempfile.TemporaryDirectory() as folder:
        engine, memory = _engine(Path(folder))
        below, most = 0, Counter[str]()
        sources: dict[str, Counter[str]] = {tenant: Counter() for tenant in TENANTS}
        for number, (tenant, context) in enumerate(asked(requests)):
            _serve(engine, f"{number}", tenant, context)
            for name in TENANTS:
                held = memory.policy.pages_of(name)
                floor = min(most[name], FLOOR_CONTEXTS * CONTEXT_PAGES)
                below += held < floor
                most[name] = max(most[name], held)
            if (number + 1) % 100 == 0:
                note(f"{number + 1} of {requests} requests to contexts are answered")
        assert engine.tiers is not None
        asked_pages = Counter(tenant for tenant, _ in asked(requests))
        for (tier, tenant), tokens in engine.tiers.hit_tokens.items():
            sources[tenant][tier] = tokens // KV_PAGE_TOKENS
        engine.close()
    ratios = {
        tenant: {
            tier: round(pages / (CONTEXT_PAGES * asked_pages[tenant]), 4)
            for tier, pages in sources[tenant].items()
        }
        for tenant in TENANTS
    }
    return {
        "requests": requests,
        "hit_ratio": ratios,
        "below_floor": below,
        "pages_held": {name: memory.policy.pages_of(name) for name in TENANTS},
    }


def _serve(engine: Engine, name: str, tenant: str, context: int) -> None:
    sampling = Sampling(max_tokens=1, temperature=0.0)
    engine.add(Request(name, _prompt(context), sampling, tenant=tenant))
    while engine.has_work:
        engine.step()
