"""A pod's contexts: computed once, pinned, counted, found after a crash, gone when expired."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from hash_engine import continuation
from hash_pods import MakePod, Served, ask, collect, ids, tier_cache
from tandem_runtime import contract
from tandem_runtime.frontend.contexts import Book, newer
from tandem_runtime.frontend.errors import BadRequest, Unavailable
from tandem_runtime.protocol import Context
from tandem_runtime.serve.context_files import ContextFiles
from tandem_runtime.serve.contexts import PodContexts

TEXT = "".join(chr(97 + n * 7 % 26) for n in range(700))
CASES = {
    "accelerator": ({}, 688),
    "memory": ({"memory_pages": 4}, 512),
    "disk": ({"disk": True}, 512),
}
"""By tier: what a pod with it is made of, and how many tokens of the text it keeps whole."""


def tiers_of(tier: str, tmp_path: Path) -> Any:
    given = dict(CASES[tier][0])
    if not given:
        return None
    return tier_cache(**(given | ({"disk": tmp_path} if "disk" in given else {})))


@pytest.fixture
async def client_of() -> AsyncIterator[Callable[[Served], openai.AsyncOpenAI]]:
    clients = []

    def make(pod: Served) -> openai.AsyncOpenAI:
        url = f"http://127.0.0.1:{pod.port}/v1"
        clients.append(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


async def create(client: openai.AsyncOpenAI, **fields: Any) -> dict[str, Any]:
    body = {"model": "hash", "prompt": TEXT, **fields}
    made: dict[str, Any] = await client.post("/contexts", body=body, cast_to=object)  # type: ignore[assignment]
    return made


async def get(client: openai.AsyncOpenAI, id_: str) -> dict[str, Any]:
    found: dict[str, Any] = await client.get(f"/contexts/{id_}", cast_to=object)  # type: ignore[assignment]
    return found


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - what is awaited here has no event
            await asyncio.sleep(0.02)


async def status(client: openai.AsyncOpenAI, id_: str, wanted: str) -> dict[str, Any]:
    async def reached() -> bool:
        return bool((await get(client, id_))["status"] == wanted)

    await until(reached)
    return await get(client, id_)


async def crowd_out(pod: Served, prompts: int = 12) -> None:
    """Other prompts take the accelerator's blocks and want the tiers' pages."""
    for n in range(prompts):
        await collect(pod, ask([(n * 11 + i * 3) % 250 for i in range(600)], stream=f"scan-{n}"))


def written(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.context"))


def damage(folder: Path) -> None:
    """Flip a bit of the first page."""
    (segment,) = folder.glob("*/*.seg")
    content = bytearray(segment.read_bytes())
    content[3000] ^= 1
    segment.write_bytes(content)


@pytest.mark.parametrize("tier", list(CASES))
async def test_answers_with_it_are_those_without_and_most_of_it_is_cached(
    make_pod: MakePod, client_of: Any, tmp_path: Path, tier: str
) -> None:
    pod = await make_pod(tiers=tiers_of(tier, tmp_path), blocks=100)
    client = client_of(pod)
    made = await create(client, tier=tier, display_name="the book", ttl_seconds=600)
    assert made["usage"] == {"total_tokens": 700}
    assert made["status"] == "building"
    assert made["expires_at"] - made["created_at"] in (600, 601)
    ready = await status(client, made["id"], "ready")
    assert (ready["tier"], ready["display_name"]) == (tier, "the book")
    await crowd_out(pod)
    prompt_ids = pod.pod.backend._models["hash"].tokenizer.encode(TEXT + " and so?")
    answer = await client.completions.create(
        model="hash",
        prompt=" and so?",
        max_tokens=4,
        seed=0,
        temperature=0,
        extra_body={"context": made["id"]},
    )
    tokenizer = pod.pod.backend._models["hash"].tokenizer
    assert answer.choices[0].text == tokenizer.decode(continuation(prompt_ids, 4))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 708
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CASES[tier][1]
    metrics = (await pod.http.get(contract.PATH_METRICS)).text
    label = f'context="{made["id"]}",engine="0",model_name="hash",tenant="default",tier="{tier}"'
    kept = CASES[tier][1] * 16
    assert f"tandem_context_bytes{{{label}}} {float(kept)}" in metrics
    assert 'tandem_contexts{engine="0",model_name="hash",state="ready"} 1.0' in metrics
    await client.delete(f"/contexts/{made['id']}", cast_to=object)
    with pytest.raises(openai.NotFoundError, match="There is no context"):
        await get(client, made["id"])
    await pod.empty()


async def test_a_conversation_goes_on_where_the_context_ends(
    make_pod: MakePod, client_of: Any
) -> None:
    pod = await make_pod()
    client = client_of(pod)
    context = [{"role": "system", "content": TEXT}]
    question = [{"role": "user", "content": "what?"}]
    made = await create(client, prompt=openai.NOT_GIVEN, messages=context)
    await status(client, made["id"], "ready")
    how: dict[str, Any] = {"model": "hash", "max_tokens": 5, "seed": 0}
    with_it = await client.chat.completions.create(
        messages=question, extra_body={"context": made["id"]}, **how
    )
    whole = await client.chat.completions.create(messages=context + question, **how)
    assert with_it.choices == whole.choices
    assert with_it.usage.prompt_tokens == whole.usage.prompt_tokens == 709 + 12
    assert with_it.usage.prompt_tokens_details.cached_tokens == 704


async def test_only_the_time_to_live_changes(make_pod: MakePod, client_of: Any) -> None:
    pod = await make_pod()
    client = client_of(pod)
    made = await create(client, ttl_seconds=60)
    path = f"/contexts/{made['id']}"
    longer: Any = await client.patch(path, body={"ttl_seconds": 3600}, cast_to=object)
    assert longer["expires_at"] - made["expires_at"] >= 3500
    with pytest.raises(openai.BadRequestError, match="display_name is not a parameter"):
        await client.patch(path, body={"display_name": "x"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="ttl_seconds or expires_at"):
        await client.patch(path, body={}, cast_to=object)
    shorter: Any = await client.patch(path, body={"ttl_seconds": 1}, cast_to=object)
    assert shorter["expires_at"] - time.time() <= 1

    async def none_left() -> bool:
        return not (await pod.http.get(contract.PATH_CONTEXTS)).json()["copies"]

    await until(none_left)
    with pytest.raises(openai.NotFoundError):
        await get(client, made["id"])


async def test_bad_input_is_told_at_once(make_pod: MakePod, client_of: Any) -> None:
    client = client_of(await make_pod(tiers=tier_cache(memory_pages=4)))
    for fields, sentence in (
        ({"prompt": "x" * 255}, "The context has 255 tokens; at least 256 are kept under a name"),
        ({"prompt": "x" * 9000}, "has 9000 tokens; the model is served with 8192"),
        ({"tier": "tape"}, "The tier 'tape' is none that keeps contexts here; write one of memory"),
        ({"tier": "disk"}, "write one of memory, accelerator, or leave it out"),
        ({"messages": [{"role": "user", "content": "x"}]}, "Send prompt or messages: one of them"),
        ({"ttl_seconds": 0}, "ttl_seconds: input should be greater than or equal to 1"),
        ({"ttl_seconds": 5, "expires_at": 5}, "Send ttl_seconds or expires_at, not both"),
        ({"expires_at": 5}, "give a time of the next"),
        ({"contents": "x"}, "contents is not a parameter of this endpoint"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await create(client, **fields)
        assert sentence in str(refused.value), fields


async def test_what_does_not_fit_says_so_and_is_kept_once_there_is_room(
    make_pod: MakePod, client_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_runtime.serve.contexts.CHECK_S", 0.05)
    monkeypatch.setattr("tandem_runtime.serve.contexts.TICK_S", 0.05)
    client = client_of(await make_pod(tiers=tier_cache(memory_pages=3)))
    first = await create(client)
    await status(client, first["id"], "ready")
    other = await create(client, prompt=TEXT[::-1])
    failed = await status(client, other["id"], "failed")
    assert "no room to keep 2 pages: it keeps 2 of its 3 already" in failed["status_reason"]
    await client.delete(f"/contexts/{first['id']}", cast_to=object)
    await status(client, other["id"], "ready")


async def test_pages_and_context_are_there_again_after_a_crash(
    make_pod: MakePod, client_of: Any, tmp_path: Path
) -> None:
    first = await make_pod(tiers=tiers_of("disk", tmp_path), disk=tmp_path)
    client = client_of(first)
    made = await create(client, ttl_seconds=600)
    gone = await create(client, prompt=TEXT[::-1])
    await status(client, made["id"], "ready")
    await client.delete(f"/contexts/{gone['id']}", cast_to=object)

    async def no_content() -> bool:
        return TEXT[::-1] not in written(tmp_path)

    await until(no_content)
    await first.end()  # nothing is written at the end: as well it could have been killed
    second = await make_pod(tiers=tiers_of("disk", tmp_path), disk=tmp_path)
    client = client_of(second)
    await status(client, made["id"], "ready")
    # Two pages came from disk; the rest of the context was computed.
    assert second.pod.worker.stats is not None
    assert second.pod.worker.stats.cached_tokens == 512
    with pytest.raises(openai.NotFoundError):
        await get(client, gone["id"])
    answered = await collect(second, ask(list(range(10))))
    assert ids(answered) == continuation(list(range(10)), 5)


async def test_a_pod_that_answers_knows_what_was_kept_before(
    make_pod: MakePod, client_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await make_pod(tiers=tiers_of("disk", tmp_path), disk=tmp_path)
    made = await create(client_of(first), ttl_seconds=600)
    await status(client_of(first), made["id"], "ready")
    await first.end()
    load = ContextFiles.load

    def slow(files: ContextFiles) -> list[Context]:
        time.sleep(0.5)
        return load(files)

    monkeypatch.setattr(ContextFiles, "load", slow)
    second = await make_pod(tiers=tiers_of("disk", tmp_path), disk=tmp_path)
    assert (await get(client_of(second), made["id"]))["id"] == made["id"]


async def test_damaged_pages_are_computed_and_kept_again(
    make_pod: MakePod, client_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_runtime.serve.contexts.CHECK_S", 0.05)
    monkeypatch.setattr("tandem_runtime.serve.contexts.TICK_S", 0.05)
    pod = await make_pod(tiers=tiers_of("disk", tmp_path))
    client = client_of(pod)
    made = await create(client)
    await status(client, made["id"], "ready")
    damage(tmp_path)
    await crowd_out(pod)
    prompt = pod.pod.backend._models["hash"].tokenizer.encode(TEXT)
    received = await collect(pod, ask([*prompt, 5], stream="again"))
    assert ids(received) == continuation([*prompt, 5], 5)
    await status(client, made["id"], "ready")

    async def kept_again() -> bool:
        await crowd_out(pod)
        events = await collect(pod, ask([*prompt, 6], stream="later"))
        assert ids(events) == continuation([*prompt, 6], 5)
        return events[0].cached_tokens == 512

    await until(kept_again)


def test_a_clock_that_is_set_moves_no_expiry() -> None:
    wall, mono = [1000.0], [50.0]
    book = Book(lambda: wall[0], lambda: mono[0])
    context = Context("c", "m", "f", "t", created_unix_s=1000, expires_unix_s=1060, prompt="x")
    assert book.take(context)
    wall[0] = 5000.0
    assert book.get("c") is context
    wall[0], mono[0] = 10.0, 111.0
    assert book.get("c") is None
    assert book.prune() == [context]


def test_room_is_for_what_is_known_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_runtime.frontend.contexts.MOST_CHARS", 100)
    now = [0.0]
    book = Book(lambda: now[0], lambda: now[0])

    def made(id_: str, chars: int, until_s: float = 60) -> Context:
        return Context(id_, "m", "f", "t", 0, until_s, prompt="x" * chars)

    for id_, until_s in (("a", 60), ("b", 10)):
        book.take(made(id_, 45, until_s))
    book.take(made("a", 45))  # known already
    book.check_room(made("c", 10))
    with pytest.raises(Unavailable, match="2 contexts of 90 characters are kept already, of at"):
        book.check_room(made("c", 11))
    book.take(newer(made("a", 5), 1.0))  # takes the place of the one before
    book.check_room(made("c", 50))
    now[0] = 11.0  # `b` has expired
    book.check_room(made("c", 95))
    with pytest.raises(Unavailable, match="1 contexts of 5 characters"):
        book.check_room(made("c", 96))


def test_what_another_process_wrote_half_is_ignored(tmp_path: Path) -> None:
    files = ContextFiles(tmp_path)
    context = Context("c", "m", "f", "t", created_unix_s=1, expires_unix_s=2, prompt="x" * 100)
    files.save(context)
    assert files.load() == [context]
    path = tmp_path / "c.context"
    whole = path.read_bytes()
    for cut in (0, 5, 16, 17, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert files.load() == []
    path.write_bytes(whole)
    assert files.load() == [context]
    assert (path.stat().st_mode & 0o777) == 0o600
    files.remove("c")
    files.remove("c")
    assert files.load() == []


def test_an_id_that_is_a_path_is_refused() -> None:
    contexts = PodContexts(None, None)  # type: ignore[arg-type]
    context = Context("../c", "m", "f", "t", created_unix_s=1, expires_unix_s=2, prompt="x")
    with pytest.raises(BadRequest, match="no id of a context"):
        contexts.put(context)
    assert msgspec.json.decode(msgspec.json.encode(context), type=Context) == context
