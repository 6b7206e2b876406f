"""Pods that give each other pages over HTTP. A hash engine's tokens are wrong if one KV byte is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from hash_engine import BLOCK_TOKENS, continuation
from hash_pods import SECRET, MakePod, Served, ask, collect, eventually, ids, tier_cache
from tandem_runtime import contract
from tandem_runtime.contract import KV_PAGE_TOKENS, Role
from tandem_runtime.kv.tiers.peer import WantedPage, WantedPages
from tandem_runtime.kv.tiers.record import header_bytes
from tandem_runtime.prefix import block_keys, root_key, token_bytes

PROMPT = [n % 250 for n in range(600)]
CACHED = 2 * KV_PAGE_TOKENS


async def answer(served: Served, prompt: list[int] = PROMPT, **fields: Any) -> int:
    """How many tokens of the prompt were cached; the answer is the right one."""
    events = await collect(served, ask(prompt, **fields))
    assert ids(events) == continuation(prompt, 5), events
    return max(event.cached_tokens for event in events)


async def metrics(served: Served) -> str:
    return (await served.http.get(contract.PATH_METRICS)).text


async def test_a_pod_takes_what_another_holds(make_pod: MakePod) -> None:
    one, two = [await make_pod(pod=f"pod-{n}", peers=True, blocks=100) for n in range(2)]
    assert await answer(one) == 0
    assert await answer(two, holder=one.holder) == CACHED
    text = await metrics(two)
    assert 'tandem_tier_hit_tokens_total{engine="0",model_name="hash",' in text
    assert 'tenant="default",tier="peer"} 512.0' in text
    assert 'tier="peer",what="loaded"} 2.0' in text
    assert "tandem_peer_pages_total" in (given := await metrics(one))
    assert 'tandem_peer_questions_total{engine="0",model_name="hash",outcome="given"}' in given
    # Its own accelerator has it now: nobody is asked.
    assert await answer(two, stream="again", holder=one.holder) == len(PROMPT) // 16 * 16
    assert one.pod.lender.counters.pages == 2
    # And it gives on what it was given.
    three = await make_pod(pod="pod-2", peers=True)
    assert await answer(three, holder=two.holder) == CACHED
    for pod in (one, two, three):
        await pod.empty()


async def test_tenants_and_salts_do_not_meet(make_pod: MakePod) -> None:
    one, two = [await make_pod(pod=f"pod-{n}", peers=True, blocks=200) for n in range(2)]
    await answer(one, tenant="a", cache_salt="x")
    for tenant, salt in (("b", "x"), ("a", ""), ("a", "y")):
        name = f"{tenant}{salt}"
        assert (
            await answer(two, stream=name, holder=one.holder, tenant=tenant, cache_salt=salt) == 0
        )
    assert one.pod.lender.counters.pages == 0
    assert await answer(two, holder=one.holder, tenant="a", cache_salt="x") == CACHED


async def test_what_the_accelerator_lost_comes_from_the_tiers_below(make_pod: MakePod) -> None:
    one = await make_pod(pod="pod-0", peers=True, tiers=tier_cache(4, peers=True))
    two = await make_pod(pod="pod-1", peers=True)
    await answer(one)
    tier = one.pod.lender._tiers.tiers[0]  # type: ignore[union-attr]
    await eventually(lambda: tier.counters.stored_pages == 2)

    def take_all(engine: Any) -> None:
        pool = engine._scheduler.pool
        pool.release(pool.allocate(pool.free_blocks))

    await one.pod.worker.call(take_all)
    assert await answer(two, holder=one.holder) == CACHED


async def test_a_prefill_pod_asks_too(make_pod: MakePod) -> None:
    one = await make_pod(pod="pod-0", peers=True)
    prefill = await make_pod(pod="prefill-0", role=Role.PREFILL, peers=True)
    decode = await make_pod(pod="decode-0", role=Role.DECODE, peers=True)
    await answer(one)
    assert await answer(decode, holder=one.holder, prefill=prefill.target) == CACHED
    assert one.pod.lender.counters.pages == 2
    # A decode pod gives what it was handed.
    two = await make_pod(pod="pod-1", peers=True)
    assert await answer(two, holder=decode.holder) == CACHED


async def ended(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await served.end()


async def lost_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_all(engine: Any) -> None:
        pool = engine._scheduler.pool
        pool.release(pool.allocate(pool.free_blocks))

    await served.pod.worker.call(take_all)


async def busy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_runtime.serve.lender.AT_ONCE", 0)


async def another_model(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.pod.lender._layout_hash = bytes(32)


async def lends_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.pod.lender.lends = False


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ended, "unreachable"),
        (lost_it, None),
        (busy, "busy"),
        (another_model, "layout"),
        (lends_nothing, "refused"),
    ],
)
async def test_a_peer_that_does_not_give_costs_nothing(
    make_pod: MakePod, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], reason: str
) -> None:
    monkeypatch.setattr("tandem_runtime.kv.tiers.breaker.FIRST_PAUSE_S", 30.0)
    one, two = [await make_pod(pod=f"pod-{n}", peers=True, blocks=200) for n in range(2)]
    await answer(one)
    await fault(one, monkeypatch)
    assert await answer(two, holder=one.holder) == 0
    text = await metrics(two)
    told = f'tandem_tier_failures_total{{engine="0",model_name="hash",reason="{reason}"'
    assert (told in text) == (reason is not None)
    # Then it is left alone for a while.
    other = PROMPT[::-1]
    assert await answer(two, other, stream="other", holder=one.holder) == 0
    if reason:
        assert f'{told},tier="peer"}} 1.0' in await metrics(two)


async def test_a_stream_that_ends_while_its_pages_come(make_pod: MakePod) -> None:
    one, two = [await make_pod(pod=f"pod-{n}", peers=True) for n in range(2)]
    await answer(one)
    asked, go_on = asyncio.Event(), asyncio.Event()
    lend = one.pod.lender.lend

    async def slowly(wanted: WantedPages) -> Any:
        asked.set()
        await go_on.wait()
        return await lend(wanted)

    one.pod.lender.lend = slowly  # type: ignore[method-assign]
    leaving = asyncio.create_task(collect(two, ask(PROMPT, holder=one.holder)))
    await asyncio.wait_for(asked.wait(), 60)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await eventually(lambda: two.pod.state().in_flight == 0)
    go_on.set()
    assert await answer(two, PROMPT, stream="next", holder=one.holder) >= CACHED
    await two.empty()


def wanted(served: Served, tenant: str = "default") -> WantedPages:
    lender = served.pod.lender
    root = root_key(lender._layout_hash, SECRET, tenant, "")
    keys = block_keys(root, PROMPT, KV_PAGE_TOKENS)
    joined = b"".join(block_keys(root, PROMPT, BLOCK_TOKENS))
    pages = []
    for n, key in enumerate(keys):
        tokens = PROMPT[n * KV_PAGE_TOKENS : (n + 1) * KV_PAGE_TOKENS]
        parent = keys[n - 1] if n else bytes(16)
        pages.append(WantedPage(key, parent, joined[n * 256 : (n + 1) * 256], token_bytes(tokens)))
    return WantedPages(lender._layout_hash, tuple(pages))


async def test_only_who_knows_the_secret_reads_pages(make_pod: MakePod) -> None:
    one = await make_pod(peers=True)
    await answer(one)
    body = msgspec.json.encode(wanted(one))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{one.port}") as stranger:
        reply = await stranger.post(contract.PATH_PEER_PAGES, content=body)
        assert reply.status_code == 403
        assert len(reply.content) < 1000
    reply = await one.http.post(contract.PATH_PEER_PAGES, content=body)
    assert reply.status_code == 200
    token_bytes = one.pod.lender._layout.token_bytes
    assert len(reply.content) == 2 * (header_bytes(KV_PAGE_TOKENS) + KV_PAGE_TOKENS * token_bytes)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"layout": "%", "pages": []}'])
async def test_a_bad_question_is_refused(make_pod: MakePod, body: bytes) -> None:
    one = await make_pod(peers=True)
    reply = await one.http.post(contract.PATH_PEER_PAGES, content=body)
    assert reply.status_code == 400
    assert "The body is no WantedPages" in reply.text


async def test_wrong_keys_of_blocks_find_nothing(make_pod: MakePod) -> None:
    one = await make_pod(peers=True)
    await answer(one)
    page = wanted(one).pages[0]
    for blocks in (b"", page.blocks[:-1], page.blocks[16:], page.blocks[::-1], page.blocks * 2):
        changed = msgspec.structs.replace(page, blocks=blocks)
        asked = msgspec.structs.replace(wanted(one), pages=(changed,))
        assert await one.pod.lender.lend(asked) == []
    other = msgspec.structs.replace(page, tokens=page.tokens[::-1])
    assert await one.pod.lender.lend(msgspec.structs.replace(wanted(one), pages=(other,))) == []
