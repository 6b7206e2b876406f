"""A Prometheus that answers, and all the ways in which one does not, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tandem_operator.plan.queries import Answer
from tandem_operator.prometheus import Prometheus

Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`serve(answer)`: a URL whose queries get this answer; requests are kept in `serve.seen`."""
    runners = []

    async def start(result: Any = None, status: int = 200, **body: Any) -> str:
        async def query(request: web.Request) -> web.Response:
            start.seen.append(request)  # type: ignore[attr-defined]
            if result == "silence":
                await asyncio.sleep(5)
            return web.json_response({"data": {"result": result}, **body}, status=status)

        app = web.Application()
        app.add_routes([web.get("/api/v1/query", query)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    start.seen = []  # type: ignore[attr-defined]
    yield start
    for runner in runners:
        await runner.cleanup()


def series(*values: str) -> list[dict[str, Any]]:
    return [{"metric": {"pod": str(n)}, "value": [1.0, v]} for n, v in enumerate(values)]


@pytest.mark.parametrize(
    ("result", "answer"),
    [
        (series("3.5"), Answer((3.5,))),
        (series("1", "2"), Answer((1.0, 2.0))),
        ([], Answer()),
        ([1700000000.0, "42"], Answer((42.0,))),
    ],
)
async def test_answers(serve: Serve, result: Any, answer: Answer) -> None:
    assert await Prometheus(await serve(result)).ask("up") == answer


async def test_not_a_number_stays_one(serve: Serve) -> None:
    (value,) = (await Prometheus(await serve(series("NaN"))).ask("up")).values
    assert value != value


@pytest.mark.parametrize(
    ("result", "status", "sentence"),
    [
        (None, 400, "refuses the query: "),
        (None, 422, "found duplicate series for the match group"),
        (None, 503, "refuses the query: "),
        ([{"metric": {}, "values": [[1, "2"]]}], 200, "returns no instant vector"),
        ("text", 200, "returns no instant vector"),
    ],
)
async def test_an_error_is_a_sentence(
    serve: Serve, result: Any, status: int, sentence: str
) -> None:
    error = "found duplicate series for the match group"
    answer = await Prometheus(await serve(result, status, error=error)).ask("up")
    assert answer.values == ()
    assert sentence in (answer.error or "")


async def test_nobody_there() -> None:
    answer = await Prometheus("http://127.0.0.1:9").ask("up")
    assert answer.error == "Prometheus at http://127.0.0.1:9 does not answer: the connection fails"


async def test_one_that_is_slow(serve: Serve) -> None:
    url = await serve("silence")
    answer = await Prometheus(url, timeout_s=0.2).ask("up")
    assert (answer.error or "").endswith("does not answer: it takes too long")


async def test_one_that_was_silent_is_not_waited_for_by_every_fleet(serve: Serve) -> None:
    now_s = [100.0]
    url = await serve("silence")
    prometheus = Prometheus(url, timeout_s=0.2, clock=lambda: now_s[0])
    answers = await asyncio.gather(*(prometheus.ask("up") for _ in range(40)))
    assert len({answer.error for answer in answers}) == 1
    assert len(serve.seen) <= 4  # type: ignore[attr-defined]
    now_s[0] += 60.0
    await prometheus.ask("up")
    assert len(serve.seen) <= 5  # type: ignore[attr-defined]


async def test_the_token_is_read_again_for_each_query(serve: Serve, tmp_path: Path) -> None:
    token = tmp_path / "token"
    prometheus = Prometheus(await serve(series("1")), str(token))
    answer = await prometheus.ask("up")
    assert "No such file" in (answer.error or "")
    for text in ("first", "second\n"):
        token.write_text(text)
        await prometheus.ask('up{a="b"}')
    seen = serve.seen  # type: ignore[attr-defined]
    assert [r.headers["authorization"] for r in seen] == ["Bearer first", "Bearer second"]
    assert seen[0].query["query"] == 'up{a="b"}'
