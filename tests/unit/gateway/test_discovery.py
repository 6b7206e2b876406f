"""The watch against an API server played by hand: what it keeps, and what it survives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from played_api import PlayedApi, kubeconfig, pod
from tandem_runtime.gateway import discovery
from tandem_runtime.gateway.discovery import PodWatch, api_client


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
    config = tmp_path / "config"
    config.write_text(kubeconfig(api.port))
    client = await api_client(str(config))
    watch = PodWatch(client, "ns")
    running = asyncio.create_task(watch.run())
    yield watch
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await client.close()


async def eventually(condition: Callable[[], bool], within_s: float = 60) -> None:
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


async def test_events_that_nobody_expects_are_survived(
    api: PlayedApi, watch: PodWatch, caplog: pytest.LogCaptureFixture
) -> None:
    api.pods = [pod("a")]
    await eventually(lambda: len(api.watches) == 1)
    api.pods = [pod("a"), pod("b")]
    api.events.put_nowait({"kind": "no event at all"})
    await eventually(lambda: names(watch) == ["a", "b"])
    assert "KeyError" in caplog.text
