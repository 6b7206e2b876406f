from __future__ import annotations

from typing import Any

import pytest
from tandem.agent import objects
from tandem.agent.api import ApiError, Object
from tandem.agent.objects import ObjectReader


class FakeApi:
    def __init__(self) -> None:
        self.answers: dict[str, Object | ApiError] = {}
        self.forbidden = 0
        self.asked: list[str] = []

    async def get(self, path: str) -> Object:
        self.asked.append(path)
        if self.forbidden:
            self.forbidden -= 1
            raise ApiError(403, "Forbidden", "not yet")
        answer = self.answers.get(path, ApiError(404, "NotFound", ""))
        if isinstance(answer, ApiError):
            raise answer
        return answer


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setattr(objects, "FORBIDDEN_PAUSE_S", 0.0)
    return FakeApi()


@pytest.fixture
def reader(api: Any) -> ObjectReader:
    return ObjectReader(api)


async def test_decoding(api: FakeApi, reader: ObjectReader) -> None:
    api.answers = {
        "/api/v1/namespaces/ns/configmaps/cm": {"data": {"a": "ü"}, "binaryData": {"b": "AAE="}},
        "/api/v1/namespaces/ns/secrets/s": {"data": {"k": "aHVzaA=="}},
    }
    assert await reader.config_map("ns", "cm") == {"a": "ü".encode(), "b": b"\x00\x01"}
    assert await reader.secret("ns", "s") == {"k": b"hush"}
    assert await reader.secret("ns", "none") is None


async def test_those_who_ask_together_share_an_answer(api: FakeApi, reader: ObjectReader) -> None:
    api.answers = {"/api/v1/namespaces/ns/secrets/s": {"data": {}}}
    await reader.secret("ns", "s")
    await reader.secret("ns", "s")
    assert len(api.asked) == 1
    await reader.secret("ns", "none")
    await reader.secret("ns", "none")
    assert len(api.asked) == 3, "what is missing is asked for again"


async def test_the_authoriser_learns_of_a_binding_a_moment_later(
    api: FakeApi, reader: ObjectReader
) -> None:
    api.answers = {"/api/v1/namespaces/ns/secrets/s": {"data": {}}}
    api.forbidden = 3
    assert await reader.secret("ns", "s") == {}
    api.forbidden = 100
    with pytest.raises(ApiError, match="403"):
        await reader.config_map("ns", "cm")


async def test_claims(api: FakeApi, reader: ObjectReader) -> None:
    claims = "/api/v1/namespaces/ns/persistentvolumeclaims"
    api.answers = {
        f"{claims}/a": {"spec": {"volumeName": "pv-a"}},
        f"{claims}/b": {"spec": {"volumeName": "pv-b"}},
        f"{claims}/unbound": {"spec": {}},
        "/api/v1/persistentvolumes/pv-a": {"spec": {"local": {"path": "/data"}}},
        "/api/v1/persistentvolumes/pv-b": {"spec": {"nfs": {"server": "x"}}},
    }
    assert await reader.claim_path("ns", "a") == "/data"
    assert await reader.claim_path("ns", "b") is None
    assert await reader.claim_path("ns", "unbound") is None
    assert await reader.claim_path("ns", "none") is None
