"""A pod's worker with cache tiers: loads happen beside the engine's thread, which is woken."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from hash_engine import HashRunner, continuation, hash_engine
from prometheus_client import CollectorRegistry, generate_latest
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, StreamOutput
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.disk import DiskTier
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import JobThread
from tandem_runtime.kv.tiers.tenants import TenantPart, TenantParts
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.metrics import EngineCollector
from tandem_runtime.serve.worker import EngineWorker

PROMPT = [n % 250 for n in range(600)]


def tiered_engine(folder: Path) -> Engine:
    def make(layout: KvLayout, layout_hash: bytes) -> TierCache:
        size = layout.token_bytes * KV_PAGE_TOKENS
        known = {"page_bytes": size, "page_tokens": KV_PAGE_TOKENS}
        disk = DiskTier(folder, 1 << 28, layout_hash=layout_hash, **known)
        part = TenantParts((TenantPart("t", 50),))
        tiers = (HostTier(3 * size, page_bytes=size, tenants=part), disk)
        return TierCache(tiers, JobThread(), page_tokens=KV_PAGE_TOKENS, compute_s=1)

    return hash_engine(blocks=50, runner=HashRunner(51), tiers=make)


async def answer(worker: EngineWorker, name: str, prompt: list[int]) -> list[StreamOutput]:
    outputs: list[StreamOutput] = []
    ended = asyncio.Event()

    def receive(output: StreamOutput, began_s: float) -> None:
        outputs.append(output)
        if output.finish_reason is not None:
            ended.set()

    request = Request(name, prompt, Sampling(max_tokens=4), tenant="t")
    worker.route(name, receive)
    await worker.call(lambda engine: engine.add(request))
    await asyncio.wait_for(ended.wait(), 10)
    return outputs


async def test_a_fetched_stream_wakes_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An idle thread looks around by itself now and then: not in this test.
    monkeypatch.setattr("tandem_runtime.serve.worker._IDLE_S", 600.0)
    worker = EngineWorker()
    engine = await worker.start(lambda: tiered_engine(tmp_path))
    try:
        await answer(worker, "cold", PROMPT)
        await answer(worker, "other", PROMPT[::-1])  # takes the pool's blocks
        assert engine.tiers is not None
        disk = engine.tiers.tiers[-1]
        until_s = time.monotonic() + 60
        while disk.counters.stored_pages < 4:  # each of them waits for the disk
            assert time.monotonic() < until_s, disk.counters
            await asyncio.sleep(0.01)
        async with asyncio.timeout(60):
            outputs = await answer(worker, "warm", PROMPT)
    finally:
        await worker.stop()
    tokens = [output.token.token_id for output in outputs if output.token]
    assert tokens == continuation(PROMPT, 4)
    assert outputs[-1].cached_tokens == 2 * KV_PAGE_TOKENS
    registry = CollectorRegistry()
    registry.register(EngineCollector("m", worker, 16, None, None, engine.tiers))
    text = generate_latest(registry).decode()
    labels = 'engine="0",model_name="m"'
    assert f'tandem_tier_hit_tokens_total{{{labels},tenant="t",tier="memory"}} ' in text
    assert f'tandem_tier_pages_total{{{labels},tier="disk",what="stored"}} 4.0' in text
    assert f'tandem_tier_resident_pages{{{labels},tier="memory"}} 3.0' in text
    assert f'tandem_tier_tenant_pages{{{labels},tenant="t",tier="memory"}} 3.0' in text
    assert 'tier="disk"' not in "".join(
        line for line in text.splitlines() if "tenant_pages" in line
    )
