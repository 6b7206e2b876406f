from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tandem.agent.api import ApiError, Object
from tandem.agent.events import KEPT, NORMAL, WARNING, EventRecorder

POD = {"metadata": {"name": "p", "namespace": "ns", "uid": "u"}}


class FakeApi:
    """Keeps Events by path, as the API server does."""

    def __init__(self) -> None:
        self.events: dict[str, Object] = {}
        self.writes: list[str] = []
        self.broken = False

    async def create(self, path: str, body: Object) -> Object:
        if self.broken:
            raise ApiError(500, "InternalError", "down")
        name = f"{path}/{body['metadata']['name']}"
        if name in self.events:
            raise ApiError(409, "AlreadyExists", "exists")
        self.writes.append("create")
        self.events[name] = dict(body)
        return body

    async def patch(self, path: str, body: Object) -> Object:
        if path not in self.events:
            raise ApiError(404, "NotFound", "gone")
        self.writes.append("patch")
        self.events[path].update(body)
        return self.events[path]


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
async def recorder(api: Any) -> AsyncIterator[EventRecorder]:
    recorder = EventRecorder(api, "node-1", lambda: 1_700_000_000.0)
    task = asyncio.create_task(recorder.run())
    yield recorder
    task.cancel()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_as_a_kubelet_reports(api: FakeApi, recorder: EventRecorder) -> None:
    recorder.record(POD, NORMAL, "Started", "it runs", "spec.containers{c}")
    await settle()
    [event] = api.events.values()
    assert event["source"] == {"component": "kubelet", "host": "node-1"}
    assert event["involvedObject"]["fieldPath"] == "spec.containers{c}"
    assert event["involvedObject"]["uid"] == "u"
    assert (event["type"], event["reason"], event["count"]) == ("Normal", "Started", 1)


async def test_a_repeated_event_is_counted(api: FakeApi, recorder: EventRecorder) -> None:
    for _ in range(3):
        recorder.record(POD, WARNING, "Unhealthy", "no answer")
        await settle()
    recorder.record(POD, WARNING, "Unhealthy", "another message")
    await settle()
    assert sorted(event["count"] for event in api.events.values()) == [1, 3]
    assert api.writes == ["create", "patch", "patch", "create"]


async def test_an_event_that_expired_begins_anew(api: FakeApi, recorder: EventRecorder) -> None:
    recorder.record(POD, WARNING, "Unhealthy", "no answer")
    await settle()
    api.events.clear()
    recorder.record(POD, WARNING, "Unhealthy", "no answer")
    await settle()
    assert len(api.events) == 1


async def test_a_successor_goes_on_with_the_event(api: FakeApi, recorder: EventRecorder) -> None:
    recorder.record(POD, WARNING, "Unhealthy", "no answer")
    await settle()
    given: Any = api
    successor = EventRecorder(given, "node-1", lambda: 1_700_000_000.0)
    task = asyncio.create_task(successor.run())
    successor.record(POD, WARNING, "Unhealthy", "no answer")
    await settle()
    task.cancel()
    assert api.writes == ["create", "patch"]


async def test_news_never_blocks(api: FakeApi, recorder: EventRecorder) -> None:
    api.broken = True
    for number in range(KEPT + 50):
        recorder.record(POD, NORMAL, "X", str(number))
    await settle()
    api.broken = False
    recorder.record(POD, NORMAL, "Last", "message")
    async with asyncio.timeout(30):
        while not api.events:  # noqa: ASYNC110 (the recorder offers no event to wait for)
            await asyncio.sleep(0)
