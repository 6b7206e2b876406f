from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tandem.agent.api import Object
from tandem.agent.tokens import Token, TokenSource

POD = {
    "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
    "spec": {"serviceAccountName": "sa"},
}


class FakeApi:
    """Answers TokenRequests; expiry is an hour after the epoch second of the count."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Object]] = []

    async def create(self, path: str, body: Object) -> Object:
        self.requests.append((path, body))
        await asyncio.sleep(0)
        number = len(self.requests)
        return {"status": {"token": f"t{number}", "expirationTimestamp": "1970-01-01T01:00:00Z"}}


@pytest.mark.parametrize(
    ("life_s", "renew_at_s"), [(600, 480), (3600, 2880), (7 * 24 * 3600, 24 * 3600)]
)
def test_renewal_is_early(life_s: float, renew_at_s: float) -> None:
    assert Token("t", 0.0, life_s).renew_at_s() == renew_at_s


async def test_a_token_is_bound_to_its_pod_and_kept_until_renewal() -> None:
    api: Any = FakeApi()
    now_s = 0.0
    source = TokenSource(api, POD, lambda: now_s)
    first = await asyncio.gather(source.token("", 3600), source.token("", 3600))
    assert first == ["t1", "t1"]
    path, body = api.requests[0]
    assert path == "/api/v1/namespaces/ns/serviceaccounts/sa/token"
    assert body["spec"]["boundObjectRef"] == {
        "kind": "Pod",
        "apiVersion": "v1",
        "name": "p",
        "uid": "u",
    }
    assert body["spec"]["audiences"] == []
    now_s = 2880.0
    assert await source.token("", 3600) == "t2"


async def test_audiences_are_kept_apart() -> None:
    api: Any = FakeApi()
    source = TokenSource(api, POD, lambda: 0.0)
    assert await source.token("", 3600) != await source.token("vault", 3600)
    assert api.requests[1][1]["spec"]["audiences"] == ["vault"]
