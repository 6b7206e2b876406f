"""What a client reads when it went too far: the limit it broke, in the shape it knows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tandem_runtime.frontend.server import HttpServer

MIB_64 = 64 << 20
USER: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def http(served: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url) as http:
        yield http


LIMITS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ["x"] * 257}, "at most 256 strings or lists; it has 257 entries.", "prompt"),
    ({"prompt": [[1]] * 257}, "at most 256 strings or lists; it has 257 entries.", "prompt"),
    (
        {"cache_salt": "x" * 257},
        "cache_salt: string should have at most 256 characters.",
        "cache_salt",
    ),
    ({"stop": "x" * 1025}, "each of at most 1024 characters; one has 1025.", "stop"),
    ({"stop": ["a", "x" * 2000]}, "each of at most 1024 characters; one has 2000.", "stop"),
    ({"stop": ["x"] * 17}, "a list of at most 16 strings", "stop"),
    ({"stop": ["x"] * 17}, "it has 17 entries.", "stop"),
    ({"stop_token_ids": [1] * 65}, "list should have at most 64 items, not 65.", "stop_token_ids"),
    ({"model": "x" * 513}, "model: string should have at most 512 characters.", "model"),
    ({"max_tokens": 500}, "the prompt has 1 and max_tokens 500, together 501", "prompt"),
]


@pytest.mark.parametrize(("change", "sentence", "param"), LIMITS)
async def test_the_broken_limit_is_named(
    http: httpx.AsyncClient, change: dict[str, Any], sentence: str, param: str
) -> None:
    reply = await http.post("/v1/completions", json={"model": "small", "prompt": "x", **change})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert sentence in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 500},
        {"messages": [{"role": "user", "content": "word " * 300}]},
    ],
)
async def test_a_chat_too_long_is_the_messages_fault(
    http: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    body = {"model": "small", "messages": USER, **change}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
async def test_null_is_the_default_of_the_extensions_too(
    http: httpx.AsyncClient, backend: Any, endpoint: str
) -> None:
    nothing = {"ignore_eos": None, "stop_token_ids": None, "cache_salt": None}
    asked = {"prompt": "x"} if endpoint == "completions" else {"messages": USER}
    reply = await http.post(f"/v1/{endpoint}", json={"model": "small", **asked, **nothing})
    assert reply.status_code == 200, reply.text
    request = backend.requests[0]
    assert request.cache_salt == ""
    assert (request.sampling.ignore_eos, request.sampling.stop_token_ids) == (False, ())


async def test_null_in_the_open_inference_protocol(http: httpx.AsyncClient, backend: Any) -> None:
    parameters = {"ignore_eos": None, "stop_token_ids": None, "cache_salt": None, "seed": None}
    body = {"text_input": "x", "parameters": parameters}
    reply = await http.post("/v2/models/small/generate", json=body)
    assert reply.status_code == 200, reply.text
    assert backend.requests[0].cache_salt == ""


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v2/models/small/generate", "/v2/models/small/infer"]
)
async def test_a_body_too_large_is_told_in_the_protocols_shape(
    http: httpx.AsyncClient, path: str, chunked: bool
) -> None:
    body = json.dumps({"model": "small", "prompt": "x" * MIB_64}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1 << 20):
            yield body[at : at + (1 << 20)]

    headers = {"content-type": "application/json"}
    content: Any = chunks() if chunked else body
    reply = await http.post(path, content=content, headers=headers)
    assert reply.status_code == 413
    error = reply.json()["error"]
    message = error if path.startswith("/v2") else error["message"]
    assert message == f"POST {path}: the body is larger than {MIB_64} bytes; send less at a time."
    if path.startswith("/v1"):
        assert error["type"] == "invalid_request_error"
        assert error.keys() == {"message", "type", "param", "code"}


async def test_a_body_of_exactly_the_limit_is_read(http: httpx.AsyncClient) -> None:
    body = b'"' + b"x" * (MIB_64 - 2) + b'"'
    headers = {"content-type": "application/json"}
    reply = await http.post("/v1/completions", content=body, headers=headers)
    assert reply.status_code == 400
    assert "The body: " in reply.json()["error"]["message"]


async def test_a_process_that_loads_says_so_in_the_protocols_shape() -> None:
    server = HttpServer("127.0.0.1", 0)
    port = await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        openai, oip = await http.get("/v1/models"), await http.get("/v2/health/ready")
        alive = await http.get("/healthz")
    await server.stop()
    assert {reply.status_code for reply in (openai, oip)} == {503}
    assert {reply.headers["retry-after"] for reply in (openai, oip)} == {"5"}
    assert openai.json() == {
        "error": {
            "message": "Still loading.",
            "type": "service_unavailable",
            "param": None,
            "code": "unavailable",
        }
    }
    assert oip.json() == {"error": "Still loading."}
    assert (alive.status_code, "retry-after" in alive.headers) == (200, False)
