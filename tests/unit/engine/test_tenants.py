"""A fleet says what tenants have of its tiers, and the engines of its pods keep to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from builders import NAMESPACE, fleet_body, model_body
from operator_world import World
from tandem.agent.environment import expand
from tandem_runtime.engine import build
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.engine.swap import Rates
from tandem_runtime.kv.tiers.cache import Fetched, TierCache
from tandem_runtime.kv.tiers.contract import Page
from tandem_runtime.kv.tiers.host import HostTier
from tandem_runtime.kv.tiers.jobs import Job
from tandem_runtime.kv.tiers.tenants import TenantPart, TenantParts
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.options import parse

MakePodEngine = Callable[..., Awaitable[Engine]]
PAGES = 20
PAGE_BYTES = 256 << 10
READER = "reader $(TANDEM_FLEET)"
ONCE = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)


class Inline:
    """Jobs that run at once."""

    def put(self, job: Job, *, urgent: bool = False) -> None:
        job()

    def later(self, delay_s: float, job: Job) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def pod_engine(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakePodEngine:
    """The engine of a pod that the operator makes for a fleet with this Memory tier."""
    monkeypatch.setattr(build, "JobThread", Inline)
    monkeypatch.setattr(build, "measure_rates", lambda *_: Rates(compute_s=2, copy_s=1))

    async def make(**tier: Any) -> Engine:
        size = str(PAGES * PAGE_BYTES)
        tiers = [{"name": "host", "medium": "Memory", "size": size, **tier}]
        world = World()
        world.kube.user_write(model_body())
        world.kube.user_write(fleet_body(prefill=None, decode={"replicas": 1}, cacheTiers=tiers))
        await world.settle()
        (pod,) = world.kube.pods(NAMESPACE)
        arguments = [
            expand(text, {"TANDEM_FLEET": "chat"}) for text in pod["spec"]["containers"][0]["args"]
        ]
        # The last one counts.
        arguments += ["--model-uri", f"file://{tiny_checkpoint()}", "--max-context-tokens=512"]
        arguments += ["--kv-cache-tokens=1024", f"--handoff-secret-file={tmp_path / 'none'}"]
        return build_engine(parse(arguments, {}).engine)

    return make


def ask(engine: Engine, tenant: str, document: int) -> int:
    """How many of the prompt's 300 tokens, one page and a little, were cached."""
    before = engine.stats().cached_tokens
    prompt = [(document * 37 + n * n) % 97 + 3 for n in range(300)]
    assert engine.add(Request(f"{tenant} {document}", prompt, ONCE, tenant=tenant)) is None
    while engine.has_work:
        engine.step()
    return engine.stats().cached_tokens - before


@pytest.mark.parametrize(
    ("tenants", "found"),
    [((), 0), (({"name": READER, "floorPercent": 20},), 4), (({"name": READER[:-1]},), 0)],
    ids=["no floor", "floor", "another's floor"],
)
async def test_a_floor_holds_against_a_scan(
    pod_engine: MakePodEngine, tenants: tuple[dict[str, Any], ...], found: int
) -> None:
    engine = await pod_engine(tenants=[{"floorPercent": 20, **tenant} for tenant in tenants])
    for document in range(4):
        assert ask(engine, READER, document) == 0
    for document in range(60):
        ask(engine, "scanner", document)
    assert engine.tiers is not None
    policy = engine.tiers.tiers[0].policy
    assert (policy.capacity_pages, policy.resident_pages) == (PAGES, PAGES)
    cached = [ask(engine, READER, document) for document in range(4)]
    assert cached == [256 if document < found else 0 for document in range(4)]
    engine.close()


async def test_quotas_hold_in_an_empty_tier(pod_engine: MakePodEngine) -> None:
    engine = await pod_engine(
        tenants=[{"name": "batch", "quotaPercent": 10}, {"name": "none", "quotaPercent": 0}],
        defaultQuotaPercent=15,
    )
    for document in range(9):
        for tenant in ("batch", "none", "default"):
            ask(engine, tenant, document)
    assert engine.tiers is not None
    policy = engine.tiers.tiers[0].policy
    assert policy.named == ("batch", "none")
    assert (policy.pages_of("batch"), policy.pages_of("none")) == (2, 0)
    assert policy.resident_pages == 2 + 3
    engine.close()


async def test_a_part_of_less_than_a_page_ends_the_pod(pod_engine: MakePodEngine) -> None:
    with pytest.raises(ValueError, match="the floor of tenant a is 4 % of a tier that holds 20"):
        await pod_engine(tenants=[{"name": "a", "floorPercent": 4}])


def test_named_tenants_are_always_told_apart_in_metrics() -> None:
    parts = TenantParts((TenantPart("named", 50),))
    tier = HostTier(1000, page_bytes=10, tenants=parts)
    tiers = TierCache((tier,), Inline(), page_tokens=256, compute_s=1)
    page = Page(b"", b"", b"", b"")
    for tenant in [*(f"invented {number}" for number in range(1000)), "named"]:
        tiers.count(Fetched(0, tiers=["memory"], tenant=tenant), 0, [page])
    assert len(tiers.hit_tokens) == 64 + 2
    assert tiers.hit_tokens["memory", "named"] == 256
    assert tiers.hit_tokens["memory", "other"] == (1000 - 64) * 256
