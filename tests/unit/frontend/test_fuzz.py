"""Whatever a client sends, the answer is its fault or ours to serve: never a 500."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem_runtime.frontend.app import create_app
from tandem_runtime.frontend.oip.service import InferenceService
from tandem_runtime.frontend.oip.statistics import Statistics

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v2/models/small/infer",
    "/v2/models/small/generate",
    "/v2/models/small/versions/1/generate_stream",
    "/v2/repository/index",
]
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "n", "tools",
    "ignore_eos", "stop_token_ids", "cache_salt", "text_input", "parameters", "inputs", "outputs",
    "id", "ready", "role", "content", "name", "shape", "datatype", "data", "binary_data_size",
]  # fmt: skip
texts = st.sampled_from(["small", "user", "", "BYTES", "text_input", "\ud800", "\0"]) | st.text()
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 2**64, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | texts, inner, max_size=5)
    ),
    max_leaves=12,
)
VALID: list[dict[str, Any]] = [
    {"model": "small", "prompt": "x"},
    {"model": "small", "messages": [{"role": "user", "content": "x"}]},
    {
        "inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}],
        "text_input": "x",
    },
]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A valid body with some fields replaced, or anything at all."""
    body: Any = draw(values)
    if draw(st.booleans()):
        body = {**draw(st.sampled_from(VALID))}
        body |= draw(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3))
    return json.dumps(body).encode()


@given(path=st.sampled_from(PATHS), body=bodies() | st.binary(max_size=60), typed=st.booleans())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_body_is_a_fault_of_ours(backend: Any, path: str, body: bytes, typed: bool) -> None:
    service = InferenceService(backend, Statistics(), lambda record: None)
    transport = httpx.ASGITransport(create_app(service))
    headers = {"content-type": "application/json"} if typed else {}

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.post(path, content=body, headers=headers)

    reply = asyncio.run(post())
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        error = reply.json()["error"]
        message = error if path.startswith("/v2") else error["message"]
        assert len(message) > 10


@pytest.mark.parametrize("path", ["/v1/models/%F0%9F", "/v2/models/%00/infer", "/v2/models//ready"])
async def test_odd_paths(backend: Any, path: str) -> None:
    service = InferenceService(backend, Statistics(), lambda record: None)
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        for method in ("GET", "POST"):
            assert (await http.request(method, path)).status_code < 500
