"""What the gateway makes of what pods say they hold."""

from __future__ import annotations

from typing import Any

import httpx
from hash_pods import MakePod, Served, collect, eventually, tier_cache
from hash_pods import ask as request
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime import contract
from tandem_runtime.contract import BLOCK_TOKENS, KV_PAGE_TOKENS
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.gateway.pages import EXPECTED_S, PagesHeld, PodPages
from tandem_runtime.gateway.prompt_keys import PromptKeys
from tandem_runtime.page_events import PageEvents

PAGE_BLOCKS = KV_PAGE_TOKENS // BLOCK_TOKENS
KEYS = PromptKeys([n.to_bytes(16, "little") for n in range(4 * PAGE_BLOCKS)], BLOCK_TOKENS)
PAGES = KEYS.pages


def held(**fields: Any) -> PagesHeld:
    pages = PagesHeld()
    pages.apply("pod", PageEvents("log", 1, snapshot=True, **fields))
    return pages


@given(told=st.integers(0, 4), guess=st.integers(0, 64).map(lambda n: 16 * n), below=st.booleans())
def test_what_a_pod_says_bounds_the_guess(told: int, guess: int, below: bool) -> None:
    pages = held(gained=b"".join(PAGES[:told]), tiers_below=below)
    tokens = pages.correct({"pod": guess, "other": guess}, KEYS, 0.0)
    assert tokens["other"] == guess  # it says nothing
    assert told * KV_PAGE_TOKENS <= tokens["pod"] <= KEYS.tokens
    if below:
        assert tokens["pod"] == max(guess, told * KV_PAGE_TOKENS)
    else:
        assert tokens["pod"] < (told + 1) * KV_PAGE_TOKENS


def test_a_page_behind_a_missing_one_is_of_no_use() -> None:
    assert held(gained=PAGES[1] + PAGES[2]).correct({}, KEYS, 0.0) == {"pod": 0}


def test_told_is_what_pods_said_and_not_what_is_expected() -> None:
    pages = held(gained=PAGES[0] + PAGES[1] + PAGES[3])
    pages.expect("pod", KEYS, 100.0)
    assert pages.told(KEYS) == {"pod": 2}


def test_a_page_may_be_on_the_accelerator_or_below() -> None:
    below = [b"below page %05d" % n for n in range(4)]
    keys = PromptKeys(KEYS.blocks, BLOCK_TOKENS, below)
    pages = held(gained=PAGES[0] + below[1] + PAGES[2] + below[2])
    assert pages.told(keys) == {"pod": 3}
    assert pages.correct({}, keys, 0.0) == {"pod": 3 * KV_PAGE_TOKENS}
    pages.apply("pod", PageEvents("log", 2, lost=below[1]))
    assert pages.told(keys) == {"pod": 1}
    assert pages.told(KEYS) == {"pod": 1}


def test_what_pages_of_others_cost_a_pod() -> None:
    assert held().peer_percents() == {}
    pages = held(peer_percent=7)
    assert pages.peer_percents() == {"pod": 7}
    pages.apply("pod", PageEvents("log", 2, peer_percent=3))
    assert pages.peer_percents() == {"pod": 3}


def test_a_page_of_larger_blocks_is_as_long() -> None:
    """On the CPU a block is 64 tokens."""
    keys = PromptKeys(KEYS.blocks[:9], 64)
    assert keys.pages == [KEYS.blocks[3], KEYS.blocks[7]]
    pages = held(gained=b"".join(keys.pages))
    assert pages.correct({"pod": 9 * 64}, keys, 0.0) == {"pod": 9 * 64}
    assert pages.correct({}, keys, 0.0) == {"pod": 2 * KV_PAGE_TOKENS}


def test_what_was_just_sent_counts_for_a_while() -> None:
    pages = held()
    pages.expect("pod", KEYS, 100.0)
    assert pages.correct({}, KEYS, 100.0 + EXPECTED_S / 2) == {"pod": KEYS.tokens}
    assert pages.correct({}, KEYS, 101.0 + EXPECTED_S) == {"pod": 0}


def test_nothing_is_left_of_a_pod_that_restarted() -> None:
    pages = held(gained=b"".join(PAGES))
    pages.expect("pod", KEYS, 0.0)
    pages.apply("pod", PageEvents("new", 0, snapshot=True))
    assert pages.correct({"pod": 1024}, KEYS, 0.0) == {"pod": KV_PAGE_TOKENS - BLOCK_TOKENS}


def test_an_entry_takes_less_than_64_bytes_at_any_size() -> None:
    pages = PodPages("log")
    for n in range(5000):
        pages.apply(PageEvents("log", n, gained=n.to_bytes(16, "little")))
        assert len(pages) == n + 1
        if n >= 64:
            assert pages.page_bytes < 64


async def ask(front: Any, text: str) -> str:
    reply = await front.http.post(
        "/v1/completions",
        json={"model": "hash", "prompt": text, "max_tokens": 2, "temperature": 0},
        headers={contract.HEADER_TRACE: "1"},
    )
    assert reply.status_code == 200, reply.text
    return str(reply.json()["tandem"]["decode_pod"])


def evict(served: Served) -> Any:
    def take_all(engine: Any) -> None:
        pool = engine._scheduler.pool
        pool.release(pool.allocate(pool.free_blocks))

    return served.pod.worker.call(take_all)


async def test_a_gateway_goes_by_what_pods_hold_and_learns_what_they_lose(
    front: Any, make_pod: MakePod
) -> None:
    pods = [await make_pod(pod=f"pod-{n}") for n in range(2)]
    front.discovery.show(*(pod.view() for pod in pods))
    await eventually(lambda: len(front.gateway.pages.held._pods) == 2)
    text = "a page and some more of it " * 22
    first = await ask(front, text)
    await eventually(lambda: front.gateway.pages.held.pages > 0)
    assert {await ask(front, text) for _ in range(4)} == {first}
    holder = next(pod for pod in pods if pod.pod.options.pod == first)
    await evict(holder)
    await eventually(lambda: front.gateway.pages.held.pages == 0)


async def test_a_gateway_that_sent_nothing_knows_what_pods_hold(
    front: Any, make_pod: MakePod
) -> None:
    pods = [await make_pod(pod=f"pod-{n}") for n in range(3)]
    text = "a page and some more of it " * 22
    prompt = Tokenizer(pods[0].pod.bundle).encode(text)
    await collect(pods[1], request(prompt))
    front.discovery.show(*(pod.view() for pod in pods))
    known = front.gateway.pages.held
    await eventually(lambda: known.pages == len(prompt) // KV_PAGE_TOKENS)
    assert {await ask(front, text) for _ in range(4)} == {"pod-1"}


async def test_a_gateway_names_a_pod_that_holds_what_another_lacks(
    front: Any, make_pod: MakePod
) -> None:
    one, two, old = [
        await make_pod(pod=name, peers=True, revision=revision)
        for name, revision in (("pod-0", "r1"), ("pod-1", "r1"), ("pod-2", "r0"))
    ]
    text = "a page and some more of it " * 22
    front.discovery.show(one.view())
    await eventually(lambda: len(front.gateway.pages.held._pods) == 1)
    assert await ask(front, text) == "pod-0"
    await eventually(lambda: front.gateway.pages.held.pages > 0)
    # It leaves; the others have nothing. One of another revision is told of nobody.
    front.discovery.show(one.view(leaving=True), old.view())
    assert await ask(front, text) == "pod-2"
    assert one.pod.lender.counters.asked == {}
    front.discovery.show(one.view(leaving=True), two.view())
    assert await ask(front, text) == "pod-1"
    lent = one.pod.lender.counters
    assert lent.pages == 2
    asked = dict(lent.asked)
    # Who holds as much itself is told of nobody.
    await eventually(lambda: len(front.gateway.pages.held._pods) == 2)
    await eventually(lambda: front.gateway.pages.held.pages == 4)
    assert await ask(front, text) == "pod-1"
    assert lent.asked == asked


async def test_pages_below_the_accelerator_are_told_and_given(
    front: Any, make_pod: MakePod
) -> None:
    one = await make_pod(pod="pod-0", peers=True, tiers=tier_cache(4, peers=True))
    two = await make_pod(pod="pod-1", peers=True)
    text = "a page and some more of it " * 22
    front.discovery.show(one.view())
    known = front.gateway.pages.held
    await eventually(lambda: len(known._pods) == 1)
    await ask(front, text)
    await eventually(lambda: known.pages == 4)  # two on the accelerator, and in memory, too
    await evict(one)
    await eventually(lambda: known.pages == 2)
    front.discovery.show(one.view(leaving=True), two.view())
    assert await ask(front, text) == "pod-1"
    assert one.pod.lender.counters.pages == 2


async def test_a_client_names_no_pod(front: Any, make_pod: MakePod) -> None:
    one, two = [await make_pod(pod=f"pod-{n}", peers=True) for n in range(2)]
    text = "a page and some more of it " * 22
    front.discovery.show(two.view())
    body = {"model": "hash", "prompt": text, "max_tokens": 2}
    holder = {"pod": "pod-0", "host": "127.0.0.1", "port": one.port}
    for url in (front.http, two.http):
        await url.post("/v1/completions", json={**body, "holder": holder})
        await url.post("/v1/completions", json={**body, "tandem": {"holder": holder}})
    assert one.pod.lender.counters.asked == {}


async def test_only_who_knows_the_secret_reads_pages(make_pod: MakePod) -> None:
    served = await make_pod()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as stranger:
        assert (await stranger.get(contract.PATH_PAGES)).status_code == 403
    assert (await served.http.get(contract.PATH_PAGES)).json()["snapshot"] is True
