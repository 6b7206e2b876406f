"""The watch against an API server played by hand: what it keeps, and what it survives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tandem_runtime import contract
from tandem_runtime.gateway import discovery
from tandem_runtime.gateway.discovery import PodWatch, api_client


def pod(name: str, *, version: int = 1, ready: bool = True, padding: int = 0) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "creationTimestamp": "2026-11-23T20:00:00Z",
            "labels": {contract.LABEL_FLEET: "chat", contract.LABEL_ROLE: "decode"},
            "annotations": {"padding": "x" * padding},
        },
        "status": {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


class PlayedApi:
    """Lists `pods` and sends what is put into `events`."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.version = 10
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.lists = 0
        self.watches: list[dict[str, str]] = []
        self.refuse: int | None = None
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._pods)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        if self.refuse is not None:
            return web.json_response({"message": "no"}, status=self.refuse)
        assert request.query["labelSelector"] == contract.LABEL_FLEET
        if request.query.get("watch") != "true":
            self.lists += 1
            metadata = {"resourceVersion": str(self.version)}
            return web.json_response({"metadata": metadata, "items": self.pods})
        self.watches.append(dict(request.query))
        reply = web.StreamResponse()
        await reply.prepare(request)
        while (event := await self.events.get()) is not None:
            await reply.write(json.dumps(event).encode() + b"\n")
        return reply


@pytest.fixture
async def api() -> AsyncIterator[PlayedApi]:
    api = PlayedApi()
    await api.start()
    yield api
    await api.stop()


@pytest.fixture
async def watch(
    api: PlayedApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PodWatch]:
    monkeypatch.setattr(discovery, "_BACKOFF_S", (0.05,))
    kubeconfig = tmp_path / "config"
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{api.port}"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [cluster],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [context],
        "current-context": "x",
    }
    kubeconfig.write_text(json.dumps(content))
    client = await api_client(str(kubeconfig))
    watch = PodWatch(client, "ns")
    running = asyncio.create_task(watch.run())
    yield watch
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await client.close()


async def eventually(condition: Callable[[], bool], within_s: float = 5) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def names(watch: PodWatch) -> list[str]:
    return sorted(view.name for view in watch.pods)


async def test_list_then_watch(api: PlayedApi, watch: PodWatch) -> None:
    api.pods = [pod("a"), pod("b")]
    await eventually(lambda: watch.synced and len(api.watches) == 1)
    assert names(watch) == ["a", "b"]
    assert api.watches[0]["resourceVersion"] == "10"
    assert api.watches[0]["allowWatchBookmarks"] == "true"
    api.events.put_nowait({"type": "ADDED", "object": pod("c", version=11)})
    api.events.put_nowait({"type": "MODIFIED", "object": pod("a", version=12, ready=False)})
    api.events.put_nowait({"type": "DELETED", "object": pod("b", version=13)})
    await eventually(lambda: names(watch) == ["a", "c"])
    assert {view.name: view.ready for view in watch.pods} == {"a": False, "c": True}


async def test_a_watch_that_ends_goes_on_from_its_last_version(
    api: PlayedApi, watch: PodWatch
) -> None:
    await eventually(lambda: len(api.watches) == 1)
    bookmark = {"kind": "Pod", "metadata": {"resourceVersion": "57"}}
    api.events.put_nowait({"type": "BOOKMARK", "object": bookmark})
    api.events.put_nowait(None)
    await eventually(lambda: len(api.watches) == 2)
    assert api.watches[1]["resourceVersion"] == "57"
    assert api.lists == 1


@pytest.mark.parametrize("how", ["event", "status"])
async def test_an_expired_version_lists_again(api: PlayedApi, watch: PodWatch, how: str) -> None:
    api.pods = [pod("a"), pod("b")]
    await eventually(lambda: len(api.watches) == 1)
    api.pods = [pod("b"), pod("c")]
    if how == "event":
        gone = {"kind": "Status", "code": 410, "message": "too old"}
        api.events.put_nowait({"type": "ERROR", "object": gone})
    else:
        api.refuse = 410
        api.events.put_nowait(None)
        await asyncio.sleep(0.2)
        api.refuse = None
    await eventually(lambda: names(watch) == ["b", "c"])
    assert api.lists >= 2


@pytest.mark.parametrize("status", [403, 500, 503])
async def test_while_the_api_refuses_the_last_view_stands(
    api: PlayedApi, watch: PodWatch, status: int
) -> None:
    api.pods = [pod("a")]
    await eventually(lambda: len(api.watches) == 1)
    api.refuse = status
    api.events.put_nowait(None)
    await asyncio.sleep(0.4)
    assert names(watch) == ["a"]
    assert watch.synced
    assert watch.age_s > 0.2
    api.refuse = None
    await eventually(lambda: len(api.watches) >= 2)
    api.events.put_nowait({"type": "ADDED", "object": pod("b", version=20)})
    await eventually(lambda: names(watch) == ["a", "b"])
    assert watch.age_s < 0.2


async def test_while_the_api_is_away_the_last_view_stands(api: PlayedApi, watch: PodWatch) -> None:
    api.pods = [pod("a")]
    await eventually(lambda: len(api.watches) == 1)
    api.events.put_nowait(None)
    await api.stop()
    await asyncio.sleep(0.4)
    assert names(watch) == ["a"]
    assert watch.age_s > 0.2
    await api.start()
    await eventually(lambda: len(api.watches) >= 2)
    api.events.put_nowait({"type": "DELETED", "object": pod("a", version=20)})
    await eventually(lambda: names(watch) == [])


async def test_pods_of_any_size(api: PlayedApi, watch: PodWatch) -> None:
    await eventually(lambda: len(api.watches) == 1)
    api.events.put_nowait({"type": "ADDED", "object": pod("a", padding=3_000_000)})
    api.events.put_nowait({"type": "ADDED", "object": pod("b", padding=10)})
    await eventually(lambda: names(watch) == ["a", "b"])


async def test_before_the_first_list_nothing_is_known(api: PlayedApi, watch: PodWatch) -> None:
    assert not watch.synced
    assert watch.pods == ()
