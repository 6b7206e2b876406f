from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from tandem.agent import reporting
from tandem.agent.api import ApiError, Object
from tandem.agent.reporting import StatusWriter

POD = {"metadata": {"name": "p", "namespace": "ns", "uid": "u"}}


class FakeApi:
    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.statuses: list[Object] = []
        self.deletes: list[tuple[str | None, int | None]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def patch(self, path: str, body: Object, content_type: str) -> Object:
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        assert path == "/api/v1/namespaces/ns/pods/p/status"
        assert body["metadata"] == {"uid": "u"}
        self.statuses.append(body["status"])
        return {}

    async def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.deletes.append((uid, grace_s))


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
async def writer(api: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StatusWriter]:
    monkeypatch.setattr(reporting, "FIRST_RETRY_S", 0.001)
    writer = StatusWriter(api, POD)
    task = asyncio.create_task(writer.run())
    yield writer
    task.cancel()


async def test_equal_statuses_are_written_once(api: FakeApi, writer: StatusWriter) -> None:
    for _ in range(3):
        writer.set({"phase": "Running"})
        await writer.settled()
    assert api.statuses == [{"phase": "Running"}]


async def test_what_others_made_of_a_condition_is_put_right(
    api: FakeApi, writer: StatusWriter
) -> None:
    """The control plane marks the pods of a silent node as not Ready."""
    mine = {"conditions": [{"type": "Ready", "status": "True"}]}
    writer.set(mine)
    await writer.settled()
    writer.saw({"conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "a"}]})
    await writer.settled()
    assert api.statuses == [mine]
    writer.saw({"conditions": [{"type": "Ready", "status": "False"}]})
    await writer.settled()
    assert api.statuses == [mine, mine]


async def test_the_latest_wins(api: FakeApi, writer: StatusWriter) -> None:
    api.gate.clear()
    for phase in ("a", "b", "c"):
        writer.set({"phase": phase})
        await asyncio.sleep(0)
    api.gate.set()
    await writer.settled()
    assert api.statuses[-1] == {"phase": "c"}
    assert {"phase": "b"} not in api.statuses


async def test_an_absent_api_only_delays(api: FakeApi, writer: StatusWriter) -> None:
    api.failures = [aiohttp.ClientConnectionError(), ApiError(500, "", ""), TimeoutError()]
    writer.set({"phase": "Running"})
    async with asyncio.timeout(30):
        await writer.settled()
    assert api.statuses == [{"phase": "Running"}]


@pytest.mark.parametrize("status", [404, 409, 422])
async def test_what_can_never_succeed_is_given_up(
    api: FakeApi, writer: StatusWriter, status: int
) -> None:
    api.failures = [ApiError(status, "", "")]
    writer.set({"phase": "Running"})
    async with asyncio.timeout(30):
        await writer.settled()
    assert api.statuses == []


async def test_the_object_goes_for_good_and_only_this_one(
    api: FakeApi, writer: StatusWriter
) -> None:
    api.failures = [aiohttp.ClientConnectionError(), ApiError(500, "", "")]
    await writer.delete_pod()
    assert api.deletes == [("u", 0)]
    api.failures = [ApiError(409, "Conflict", "another uid")]
    await writer.delete_pod()
    assert len(api.deletes) == 1
