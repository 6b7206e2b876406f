"""Requests for a fleet without pods are held, bounded and with a deadline, until one serves."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hash_pods import MakePod, eventually
from tandem_runtime.contract import PATH_STATE, PATH_WAKEABLE
from tandem_runtime.gateway import waking

BODY = {"model": "hash", "prompt": [7] * 3, "max_tokens": 4}


async def tell(
    front: Any, fleets: dict[str, list[str]], uid: str = "uid-gateway"
) -> httpx.Response:
    headers = {"authorization": f"Bearer {uid}"}
    reply: httpx.Response = await front.http.post(
        PATH_WAKEABLE, json={"fleets": fleets}, headers=headers
    )
    return reply


async def held(front: Any) -> dict[str, int]:
    reply = await front.http.get(PATH_STATE)
    found: dict[str, int] = reply.json()["held"]
    return found


def ask(front: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(front.http.post("/v1/completions", json=BODY))


async def test_a_request_waits_until_a_pod_serves(front: Any, make_pod: MakePod) -> None:
    assert (await tell(front, {"fleet-1": ["hash"]})).status_code == 200
    listed = (await front.http.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["hash"]
    asking = [ask(front) for _ in range(3)]
    await eventually(lambda: front.gateway._fleets.waking.held == {"fleet-1": 3})
    assert await held(front) == {"fleet-1": 3}
    pod = await make_pod()
    front.discovery.show(pod.view(ip="", ready=False))
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in asking)
    front.discovery.show(pod.view())
    for reply in await asyncio.gather(*asking):
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 4
    assert await held(front) == {}


async def test_a_fleet_that_nobody_wakes_is_answered_at_once(front: Any) -> None:
    assert (await ask(front)).status_code == 404
    await tell(front, {"fleet-1": ["hash"]})
    await tell(front, {"fleet-2": ["other"]})
    assert (await ask(front)).status_code == 404


async def test_nobody_waits_for_a_fleet_that_is_not_woken_any_more(front: Any) -> None:
    await tell(front, {"fleet-1": ["hash"]})
    asking = ask(front)
    await eventually(lambda: front.gateway._fleets.waking.held == {"fleet-1": 1})
    await tell(front, {})
    reply = await asyncio.wait_for(asking, 30)
    assert reply.status_code == 503
    assert reply.json()["error"]["message"].startswith("No pod of fleet 'fleet-1' can serve now")
    assert await held(front) == {}


async def test_too_many_are_refused(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "MOST_HELD", 2)
    await tell(front, {"fleet-1": ["hash"]})
    waiting = [ask(front) for _ in range(2)]
    await eventually(lambda: front.gateway._fleets.waking.held == {"fleet-1": 2})
    reply = await ask(front)
    assert reply.status_code == 503
    assert "2 requests wait for it already" in reply.json()["error"]["message"]
    assert reply.headers["retry-after"] == "30"
    for task in waiting:
        task.cancel()


async def test_nobody_waits_for_ever(front: Any) -> None:
    front.gateway._fleets.waking._hold_s = 0.3
    await tell(front, {"fleet-1": ["hash"]})
    reply = await ask(front)
    assert reply.status_code == 503
    message = reply.json()["error"]["message"]
    assert message.startswith("Fleet 'fleet-1' did not wake within 0.3 s: No pod of fleet")
    assert await held(front) == {}


async def test_only_whoever_knows_the_pod_may_tell(front: Any) -> None:
    assert (await tell(front, {"fleet-1": ["hash"]}, uid="another")).status_code == 403
    headers = {"authorization": "Bearer uid-gateway"}
    reply = await front.http.post(PATH_WAKEABLE, content=b"[1]", headers=headers)
    assert reply.status_code == 400
    assert (await ask(front)).status_code == 404


async def test_a_leaving_gateway_sends_them_elsewhere(front: Any) -> None:
    await tell(front, {"fleet-1": ["hash"]})
    asking = ask(front)
    await eventually(lambda: front.gateway._fleets.waking.held == {"fleet-1": 1})
    front.ended = True
    stopping = asyncio.create_task(front.gateway.stop())
    reply = await asking
    assert reply.status_code == 503
    assert "This gateway is ending; ask again" in reply.json()["error"]["message"]
    await stopping
