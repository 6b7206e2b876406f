"""The client against a server that misbehaves as API servers do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tandem.agent import api as api_module
from tandem.agent.api import Api, ApiError, Changed, Listed


def pod(name: str, version: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": name, "resourceVersion": version}}


class Script:
    """What the server does at each list and each watch, in order."""

    def __init__(self) -> None:
        self.lists: list[list[dict[str, Any]]] = []
        self.watches: list[Callable[[web.StreamResponse], Awaitable[None]]] = []
        self.requests: list[dict[str, str]] = []

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.query))
        if "watch" not in request.query:
            items = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
            return web.json_response({"metadata": {"resourceVersion": "10"}, "items": items})
        response = web.StreamResponse()
        await response.prepare(request)
        if self.watches:
            await self.watches.pop(0)(response)
        else:
            await asyncio.sleep(3600)
        return response


async def send(response: web.StreamResponse, kind: str, item: dict[str, Any]) -> None:
    await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
async def client(script: Script, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    monkeypatch.setattr(api_module, "FIRST_RETRY_S", 0.01)
    app = web.Application()
    app.router.add_get("/pods", script.serve)
    app.router.add_get("/fails", refuse)
    app.router.add_get("/breaks", break_)
    async with TestServer(app) as server, Api(str(server.make_url("")).rstrip("/")) as api:
        yield api


async def refuse(request: web.Request) -> web.Response:
    status = {"kind": "Status", "reason": "Forbidden", "message": "you may not", "code": 403}
    return web.json_response(status, status=403)


async def break_(request: web.Request) -> web.Response:
    return web.Response(status=502, text="<html>bad gateway")


async def take(client: Api, count: int, **params: str) -> list[Listed | Changed]:
    news: list[Listed | Changed] = []
    async with asyncio.timeout(60):
        async for item in client.follow("/pods", params):
            news.append(item)
            if len(news) == count:
                break
    return news


async def test_refusals_carry_the_servers_sentence(client: Api) -> None:
    with pytest.raises(ApiError, match="403 Forbidden: you may not"):
        await client.get("/fails")
    with pytest.raises(ApiError, match="502"):
        await client.get("/breaks")


async def test_list_then_changes(client: Api, script: Script) -> None:
    async def watch(response: web.StreamResponse) -> None:
        await send(response, "ADDED", pod("b", "11"))
        await send(response, "BOOKMARK", pod("", "15"))
        await send(response, "DELETED", pod("a", "16"))
        await asyncio.sleep(3600)

    script.lists = [[pod("a", "5")]]
    script.watches = [watch]
    news = await take(client, 3, fieldSelector="spec.nodeName=n")
    assert news == [
        Listed([pod("a", "5")]),
        Changed(pod("b", "11"), deleted=False),
        Changed(pod("a", "16"), deleted=True),
    ]
    assert [request["fieldSelector"] for request in script.requests] == ["spec.nodeName=n"] * 2
    assert script.requests[1]["resourceVersion"] == "10"


async def test_a_broken_watch_goes_on_where_it_was(client: Api, script: Script) -> None:
    async def breaks(response: web.StreamResponse) -> None:
        await send(response, "ADDED", pod("a", "11"))
        await send(response, "BOOKMARK", pod("", "20"))
        await response.write(b'{"type": "ADD')

    async def goes_on(response: web.StreamResponse) -> None:
        await send(response, "MODIFIED", pod("a", "21"))
        await asyncio.sleep(3600)

    script.lists = [[]]
    script.watches = [breaks, goes_on]
    news = await take(client, 3)
    assert [type(item) for item in news] == [Listed, Changed, Changed]
    assert script.requests[-1]["resourceVersion"] == "20"


@pytest.mark.parametrize("in_stream", [True, False])
async def test_gone_means_list_again(client: Api, script: Script, in_stream: bool) -> None:
    async def gone(response: web.StreamResponse) -> None:
        status = {"code": 410, "reason": "Expired", "message": "too old resource version"}
        await send(response, "ERROR", status)

    script.lists = [[pod("a", "5")], [pod("b", "6")]]
    script.watches = [gone]
    if not in_stream:
        script.serve = gone_at_once(script)  # type: ignore[method-assign]
    news = await take(client, 2)
    assert news == [Listed([pod("a", "5")]), Listed([pod("b", "6")])]


def gone_at_once(script: Script) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    serve = script.serve

    async def wrapped(request: web.Request) -> web.StreamResponse:
        if "watch" in request.query:
            return web.json_response({"reason": "Gone", "message": "gone"}, status=410)
        return await serve(request)

    return wrapped


async def test_a_silent_watch_is_given_up(
    client: Api, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "SILENCE_S", 0.1)

    async def talks(response: web.StreamResponse) -> None:
        await send(response, "ADDED", pod("a", "11"))

    async def silent(response: web.StreamResponse) -> None:
        await asyncio.sleep(3600)

    script.lists = [[]]
    script.watches = [silent, talks]
    assert await take(client, 2) == [Listed([]), Changed(pod("a", "11"), deleted=False)]
