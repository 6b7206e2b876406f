"""Triton's generate extension, as its own examples ask it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest


@pytest.fixture
async def http(served: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{served.url}/v2/models/small") as http:
        yield http


def asks(where: str, stream: object) -> dict[str, Any]:
    """`stream` among the parameters, or beside the text, as an input of the model's."""
    if where == "beside":
        return {"text_input": "x", "stream": stream}
    return {"text_input": "x", "parameters": {"stream": stream, "temperature": 0}}


def events(reply: httpx.Response) -> list[str]:
    lines = [line for line in reply.text.split("\n\n") if line]
    return [json.loads(line.removeprefix("data: "))["text_output"] for line in lines]


@pytest.mark.parametrize("where", ["parameters", "beside"])
class TestStream:
    @pytest.mark.parametrize("stream", [False, None])
    async def test_generate_without(
        self, http: httpx.AsyncClient, where: str, stream: bool | None
    ) -> None:
        reply = await http.post("/generate", json=asks(where, stream))
        assert reply.status_code == 200, reply.text
        assert reply.json()["text_output"] == "Hello world"

    async def test_generate_with(self, http: httpx.AsyncClient, backend: Any, where: str) -> None:
        reply = await http.post("/generate", json=asks(where, True))
        assert reply.status_code == 400
        assert reply.json()["error"] == (
            "generate answers once; for stream: true use generate_stream."
        )
        assert backend.requests == []

    @pytest.mark.parametrize("stream", [True, None])
    async def test_generate_stream_with(
        self, http: httpx.AsyncClient, backend: Any, where: str, stream: bool | None
    ) -> None:
        backend.says("Hel", "lo")
        assert events(await http.post("/generate_stream", json=asks(where, stream))) == [
            "Hel",
            "lo",
        ]

    async def test_generate_stream_without(
        self, http: httpx.AsyncClient, backend: Any, where: str
    ) -> None:
        backend.says("Hel", "lo")
        assert events(await http.post("/generate_stream", json=asks(where, False))) == ["Hello"]

    async def test_neither_true_nor_false(self, http: httpx.AsyncClient, where: str) -> None:
        reply = await http.post("/generate", json=asks(where, "yes"))
        assert reply.status_code == 400
        assert reply.json()["error"] == "stream must be true or false."


async def test_infer_takes_it_as_a_parameter_too(http: httpx.AsyncClient) -> None:
    text = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    reply = await http.post("/infer", json={"inputs": [text], "parameters": {"stream": False}})
    assert reply.json()["outputs"][0]["data"] == ["Hello world"]
    reply = await http.post("/infer", json={"inputs": [text], "parameters": {"stream": True}})
    assert reply.status_code == 400
    assert "infer answers once; for stream: true use" in reply.json()["error"]
