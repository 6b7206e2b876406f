"""Contexts through the gateway: kept by pods, used by requests, repaired when pods come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from aiohttp import web
from hash_engine import continuation
from hash_pods import MakePod, Served, tier_cache
from tandem_runtime import context_keys, contract
from tandem_runtime.contract import Role
from tandem_runtime.gateway.run import Gateway
from tandem_runtime.protocol import Context, ContextStates

TEXT = "".join(chr(97 + n * 7 % 26) for n in range(700))
OPERATOR = {"authorization": "Bearer uid-gateway"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_runtime.gateway.contexts.PERIOD_S", 0.05)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - what is awaited here has no event
            await asyncio.sleep(0.02)


async def create(front: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": "hash", "prompt": TEXT, **fields}

    async def post() -> httpx.Response:
        reply: httpx.Response = await front.http.post("/v1/contexts", json=body)
        return reply

    # On a starved machine pods fall silent for a while; the gateway says to come again.
    async with asyncio.timeout(60):
        while (reply := await post()).status_code == 503:  # noqa: ASYNC110
            await asyncio.sleep(float(reply.headers["retry-after"]))
    assert reply.status_code == 200, reply.text
    made: dict[str, Any] = reply.json()
    return made


async def ready(front: Any, id_: str, copies: int = 1) -> None:
    async def kept() -> bool:
        found = await front.http.get(f"/v1/contexts/{id_}")
        return found.status_code == 200 and bool(found.json()["copies"]["ready"] >= copies)

    await until(kept)


async def ask(front: Any, id_: str, **fields: Any) -> httpx.Response:
    body = {"model": "hash", "prompt": "?", "max_tokens": 3, "seed": 0, "context": id_, **fields}
    headers = {contract.HEADER_TRACE: "1", **fields.pop("headers", {})}
    body.pop("headers", None)
    reply: httpx.Response = await front.http.post("/v1/completions", json=body, headers=headers)
    return reply


def right(pod: Served, text: str) -> str:
    tokenizer = pod.pod.backend._models["hash"].tokenizer
    return tokenizer.decode(continuation(tokenizer.encode(text), 3))


async def test_requests_go_to_the_pod_that_keeps_it(front: Any, make_pod: MakePod) -> None:
    pods = [await make_pod(pod=f"pod-{n}", tiers=tier_cache(4)) for n in range(3)]
    front.discovery.show(*(pod.view() for pod in pods))
    made = await create(front)
    await ready(front, made["id"])
    holders = [pod for pod in pods if pod.pod.contexts.copies]
    assert len(holders) == 1
    for _ in range(5):
        answer = (await ask(front, made["id"])).json()
        assert answer["choices"][0]["text"] == right(pods[0], TEXT + "?")
        assert answer["tandem"]["decode_pod"] == holders[0].pod.options.pod
        assert answer["usage"]["prompt_tokens"] == 701
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512
    metrics = (await front.http.get(contract.PATH_METRICS)).text
    label = f'context="{made["id"]}",fleet="fleet-1",tenant="default",tier="memory"'
    assert f"tandem_context_requests_total{{{label}}} 5.0" in metrics
    tokens = metrics.split(f"tandem_context_cached_tokens_total{{{label}}} ")[1].split()[0]
    saved = metrics.split(f"tandem_context_saved_prefill_seconds_total{{{label}}} ")[1].split()[0]
    assert 5 * 512 <= float(tokens) <= 5 * 700
    assert float(saved) == float(tokens)  # the tiers were told that a token takes a second


async def test_a_prefill_pod_keeps_it_for_the_pods_that_decode(
    front: Any, make_pod: MakePod
) -> None:
    prefill = await make_pod(pod="prefill-0", role=Role.PREFILL, tiers=tier_cache(4))
    decode = await make_pod(pod="decode-0", role=Role.DECODE)
    front.discovery.show(prefill.view(), decode.view())
    made = await create(front)
    await ready(front, made["id"])
    assert prefill.pod.contexts.copies
    assert not decode.pod.contexts.copies
    answer = (await ask(front, made["id"])).json()
    assert answer["choices"][0]["text"] == right(decode, TEXT + "?")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512


async def test_what_begins_with_it_is_hashed_from_its_end_on(
    front: Any, make_pod: MakePod, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = await make_pod(pod="prefill-0", role=Role.PREFILL, tiers=tier_cache(4))
    decode = await make_pod(pod="decode-0", role=Role.DECODE)
    front.discovery.show(prefill.view(), decode.view())
    made = await create(front)
    await ready(front, made["id"])
    answer = (await ask(front, made["id"])).json()
    hashed: list[int] = []
    continue_keys = context_keys.continue_keys

    def counted(keys: list[bytes], root: bytes, tokens: Any, size: int) -> None:
        hashed.append(len(tokens) // 4)
        continue_keys(keys, root, tokens, size)

    monkeypatch.setattr(context_keys, "continue_keys", counted)
    again = (await ask(front, made["id"])).json()
    assert again["choices"][0]["text"] == answer["choices"][0]["text"]
    # By the gateway, the prefill pod and the decode pod: blocks, and pages where there are tiers.
    assert len(hashed) >= 5
    assert max(hashed) < 256 + 8, "no more than what is no whole page of the context"


async def test_what_a_pod_kept_that_is_gone_is_not_ready(front: Any, make_pod: MakePod) -> None:
    pod = await make_pod()
    front.discovery.show(pod.view())
    made = await create(front)
    await ready(front, made["id"])
    front.discovery.show()
    found = await front.http.get(f"/v1/contexts/{made['id']}")
    assert found.json()["status"] == "building"


async def test_it_outlives_its_pod_and_its_gateway(
    front: Any, make_pod: MakePod, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [await make_pod(pod=f"pod-{n}") for n in range(2)]
    front.discovery.show(first.view(), second.view())
    made = await create(front)
    await ready(front, made["id"])
    holder, other = (first, second) if first.pod.contexts.copies else (second, first)
    await holder.end()
    front.discovery.show(other.view())
    answer = (await ask(front, made["id"])).json()  # computed, while it is not kept again
    assert answer["choices"][0]["text"] == right(other, TEXT + "?")
    await ready(front, made["id"])
    assert [copy.id for copy in other.pod.contexts.copies] == [made["id"]]
    # A gateway that knows nothing learns it from the pods.
    started = Gateway(front.gateway._options, front.discovery)
    port, _ = await started.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            found = await http.get(f"/v1/contexts/{made['id']}")
            assert found.status_code == 200, found.text
            assert found.json()["usage"] == {"total_tokens": 700}
            # What one gateway deletes is gone for the other, and does not come back.
            await http.delete(f"/v1/contexts/{made['id']}")
    finally:
        await started.stop()

    async def gone() -> bool:
        return (await front.http.get(f"/v1/contexts/{made['id']}")).status_code == 404

    await until(gone)
    third = await make_pod(pod="pod-3")
    front.discovery.show(other.view(), third.view())
    await front.gateway.backend.contexts.refresh()
    assert not third.pod.contexts.copies
    assert (await ask(front, made["id"])).status_code == 404


async def test_every_revision_has_its_copies(front: Any, make_pod: MakePod) -> None:
    old = await make_pod(pod="old", revision="r1")
    front.discovery.show(old.view())
    made = await create(front)
    await ready(front, made["id"])
    new = [await make_pod(pod=f"new-{n}", revision="r2") for n in range(2)]
    front.discovery.show(old.view(), *(pod.view() for pod in new))
    await ready(front, made["id"], copies=2)
    assert sum(bool(pod.pod.contexts.copies) for pod in new) == 1
    front.discovery.show(*(pod.view() for pod in new))
    await ready(front, made["id"], copies=1)


async def test_foreign_expired_deleted_and_unknown_ones_are_told_alike(
    front: Any, make_pod: MakePod
) -> None:
    pod = await make_pod()
    front.discovery.show(pod.view())
    mine = {contract.HEADER_TENANT: "mine"}
    body = {"model": "hash", "prompt": TEXT, "ttl_seconds": 3600}
    foreign = (await front.http.post("/v1/contexts", json=body, headers=mine)).json()["id"]
    salted = (await front.http.post("/v1/contexts", json=body | {"cache_salt": "s"})).json()["id"]
    expired = (await front.http.post("/v1/contexts", json=body | {"ttl_seconds": 1})).json()["id"]
    gone = (await front.http.post("/v1/contexts", json=body)).json()["id"]
    await front.http.delete(f"/v1/contexts/{gone}")

    async def has_expired() -> bool:
        return (await front.http.get(f"/v1/contexts/{expired}")).status_code == 404

    await until(has_expired)
    rounds = []
    contexts = front.gateway.backend.contexts
    for id_ in (foreign, salted, expired, gone, "ctx-" + 32 * "0"):
        answers = [
            await front.http.get(f"/v1/contexts/{id_}"),
            await front.http.patch(f"/v1/contexts/{id_}", json={"ttl_seconds": 9}),
            await front.http.delete(f"/v1/contexts/{id_}"),
        ]
        asked = contexts._asked
        answers.append(await ask(front, id_))
        rounds.append(contexts._asked - asked)
        for answer in answers:
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "context_not_found"
            assert answer.json()["error"]["message"].replace(id_, "X") == (
                "There is no context 'X' for this tenant and cache_salt: it may have expired; "
                "create it again."
            )
    # The pods are asked for each of them, so that none is answered sooner.
    assert rounds == [1] * 5
    for headers, salt, expected in (
        ({}, "", [expired, salted][:0]),
        (mine, "", [foreign]),
        ({}, "s", [salted]),
    ):
        listed = await front.http.get(
            "/v1/contexts", headers=headers, params={"cache_salt": salt} if salt else {}
        )
        assert [entry["id"] for entry in listed.json()["data"]] == expected
    with_salt = await ask(front, salted, cache_salt="s")
    assert with_salt.status_code == 200
    assert (await ask(front, foreign, headers=mine)).status_code == 200


async def test_pages_of_a_list(front: Any, make_pod: MakePod) -> None:
    front.discovery.show((await make_pod()).view())
    made = [(await create(front, prompt=TEXT + str(n)))["id"] for n in range(5)]
    seen: list[str] = []
    while True:
        params = {"limit": 2} | ({"after": seen[-1]} if seen else {})
        page = (await front.http.get("/v1/contexts", params=params)).json()
        seen += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
    assert seen == made[::-1]


async def test_what_pods_refuse_is_refused_and_leaves_nothing(
    front: Any, make_pod: MakePod
) -> None:
    pod = await make_pod()
    front.discovery.show(pod.view())
    body = {"model": "hash", "prompt": TEXT, "tier": "disk"}
    with pytest.raises(openai.BadRequestError, match="write one of accelerator, or leave it out"):
        await front.client.post("/contexts", body=body, cast_to=object)
    assert (await front.http.get("/v1/contexts")).json()["data"] == []
    sleepy = await make_pod(pod="prefill", role=Role.PREFILL)
    front.discovery.show(sleepy.view(ready=False), pod.view(leaving=True))
    reply = await front.http.post("/v1/contexts", json={"model": "hash", "prompt": TEXT})
    assert reply.status_code == 503


async def test_another_models_context(front: Any, make_pod: MakePod) -> None:
    one = await make_pod(pod="a")
    other = await make_pod(pod="b", fleet="fleet-2", served_names=("second",))
    front.discovery.show(one.view(), other.view())
    made = await create(front)
    reply = await ask(front, made["id"], model="second")
    assert reply.status_code == 400
    assert "was made for model 'hash', not for 'second'" in reply.json()["error"]["message"]
    assert (await ask(front, made["id"], model="alias")).status_code == 200


async def test_the_operator_declares_contexts(front: Any, make_pod: MakePod) -> None:
    front.discovery.show((await make_pod(tiers=tier_cache(4))).view())
    declared = Context(
        "handbook", "hash", "fleet-1", "default", 1.0, 4e9, prompt=TEXT, origin="CachedContext"
    )
    body = msgspec.json.encode(declared)
    wrong = await front.http.put(contract.PATH_CONTEXTS, content=body)
    assert wrong.status_code == 403
    told = await front.http.put(contract.PATH_CONTEXTS, content=body, headers=OPERATOR)
    assert told.status_code == 200, told.text
    await ready(front, "handbook")
    assert (await ask(front, "handbook")).status_code == 200

    async def states() -> ContextStates:
        reply = await front.http.get(contract.PATH_CONTEXTS, headers=OPERATOR)
        return msgspec.json.decode(reply.content, type=ContextStates)

    (state,) = (await states()).contexts
    assert (state.context.id, state.context.prompt, state.requests) == ("handbook", "", 1)
    assert state.pods["pod-0"].state == "ready"
    assert state.pods["pod-0"].bytes == 512 * 16
    assert state.cached_tokens >= 512
    later = msgspec.structs.replace(declared, created_unix_s=2.0, prompt=TEXT[::-1])
    await front.http.put(
        contract.PATH_CONTEXTS, content=msgspec.json.encode(later), headers=OPERATOR
    )

    async def renewed() -> bool:
        (now,) = (await states()).contexts
        copy = now.pods["pod-0"]
        return copy.created_unix_s == 2.0 and copy.state == "ready"

    await until(renewed)
    answer = (await ask(front, "handbook")).json()
    assert answer["choices"][0]["text"] != ""


async def test_a_gateway_reads_what_is_elsewhere(
    front: Any, make_pod: MakePod, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tandem_runtime.gateway.context_sources.AGAIN_S", 0.05)
    monkeypatch.setattr("tandem_runtime.serve.files.claim_text.__defaults__", (tmp_path,))
    served: list[str] = []

    async def document(request: web.Request) -> web.Response:
        served.append(request.path)
        if len(served) == 1:
            raise web.HTTPServiceUnavailable
        return web.Response(text=TEXT)

    app = web.Application()
    app.router.add_get("/book", document)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    pod = await make_pod()
    front.discovery.show(pod.view())

    async def state(id_: str) -> Any:
        return (await front.http.get(f"{contract.PATH_CONTEXTS}/{id_}", headers=OPERATOR)).json()

    async def put(id_: str, uri: str) -> None:
        told = Context(id_, "hash", "fleet-1", "default", 1.0, 4e9, uri=uri, role="system")
        body = msgspec.json.encode(told)
        reply = await front.http.put(contract.PATH_CONTEXTS, content=body, headers=OPERATOR)
        assert reply.status_code == 200, reply.text

    try:
        await put("page", f"http://127.0.0.1:{port}/book")
        await ready(front, "page")
        assert len(served) == 2
        assert (await ask(front, "page")).status_code == 200
        await put("file", "pvc://docs/book.txt")

        async def refused() -> bool:
            return "claim 'docs' is not mounted" in (await state("file")).get("reason", "")

        await until(refused)
        lay(tmp_path)
        await ready(front, "file")
        # Renewed, it is not read again.
        await put("page", f"http://127.0.0.1:{port}/book")
        assert len(served) == 2
    finally:
        await runner.cleanup()


def lay(folder: Path) -> None:
    (folder / "docs").mkdir()
    (folder / "docs" / "book.txt").write_text(TEXT)
