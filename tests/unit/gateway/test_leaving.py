"""A gateway that leaves: clients move on, its streams end, then it does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton
from hash_pods import MakePod
from tandem_runtime import contract
from tandem_runtime.gateway import run
from tritonclient.utils import InferenceServerException


def body(max_tokens: int = 4) -> dict[str, Any]:
    return {"model": "hash", "prompt": "some text", "max_tokens": max_tokens, "seed": 0}


async def leave(front: Any) -> asyncio.Task[None]:
    """SIGTERM came."""
    front.ended = True
    leaving = asyncio.create_task(front.gateway.stop())
    await asyncio.sleep(0.05)
    return leaving


@pytest.fixture
async def stream(front: Any, make_pod: MakePod) -> Any:
    """A stream that takes a while."""
    pod = await make_pod(step_s=0.02)
    front.discovery.show(pod.view())
    stream = await front.client.completions.create(**body(80), stream=True)
    await anext(stream)
    return stream


async def test_while_it_lingers_it_answers_and_sends_clients_away(
    front: Any, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_LINGER_S", 0.5)
    before = await front.http.post("/v1/completions", json=body())
    assert "connection" not in before.headers
    leaving = await leave(front)
    reply = await front.http.post("/v1/completions", json=body())
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")
    models = await front.http.get("/v1/models")
    assert models.headers["connection"] == "close"
    await stream.close()
    await asyncio.wait_for(leaving, 30)


async def test_after_the_linger_it_admits_nothing(front: Any, stream: Any) -> None:
    leaving = await leave(front)
    reply = await front.http.post("/v1/completions", json=body())
    assert reply.status_code == 503
    assert reply.headers["connection"] == "close"
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["message"] == "This gateway is ending; ask again."
    generate = {"text_input": "x"}
    reply = await front.http.post("/v2/models/hash/generate", json=generate)
    assert (reply.status_code, "error" in reply.json()) == (503, True)
    assert (await front.http.get(contract.PATH_READY)).status_code == 503
    assert (await front.http.get(contract.PATH_HEALTH)).status_code == 200
    assert (await front.http.get(contract.PATH_STATE)).json()["streams"] == 1
    assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
    await asyncio.wait_for(leaving, 30)


async def test_it_ends_under_steady_traffic(front: Any, stream: Any) -> None:
    async def ask_on() -> None:
        with contextlib.suppress(httpx.TransportError):
            while True:
                await front.http.post("/v1/completions", json=body())

    asking = [asyncio.create_task(ask_on()) for _ in range(4)]
    leaving = await leave(front)
    assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
    await asyncio.wait_for(leaving, 30)
    await asyncio.wait_for(asyncio.gather(*asking), 30)


async def test_grpc_clients_are_sent_away_too(front: Any, stream: Any) -> None:
    text = triton_grpc.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    async with triton.InferenceServerClient(front.grpc_url) as client:
        running = asyncio.create_task(
            client.infer("hash", [text], parameters={"max_tokens": 40, "ignore_eos": True})
        )
        await asyncio.sleep(0.2)
        leaving = await leave(front)
        with pytest.raises(InferenceServerException) as refused:
            await client.infer("hash", [text])
        assert refused.value.status() == str(grpc.StatusCode.UNAVAILABLE)
        assert (await running).as_numpy("text_output") is not None, "what ran goes on"
    await stream.close()
    await asyncio.wait_for(leaving, 30)


async def test_an_open_grpc_call_is_refused_and_does_not_hold_the_gateway(
    front: Any, stream: Any
) -> None:
    text = triton_grpc.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    more = asyncio.Event()

    async def asks() -> Any:
        yield {"model_name": "hash", "inputs": [text]}
        await more.wait()
        yield {"model_name": "hash", "inputs": [text]}
        await asyncio.Event().wait()

    async with triton.InferenceServerClient(front.grpc_url) as client:
        answers = client.stream_infer(asks())
        _, error = await anext(answers)
        assert error is None
        leaving = await leave(front)
        more.set()
        _, error = await anext(answers)
        assert "This gateway is ending" in str(error)
        await stream.close()
        await asyncio.wait_for(leaving, 30)
