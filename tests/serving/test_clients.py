"""Unmodified clients against real processes: openai, and tritonclient over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

NAME = "smollm2-135m"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(params=["pod", "gateway"])
def url(request: pytest.FixtureRequest, both_pod: Any, gateway: Any) -> str:
    """Straight to a pod, and through the gateway."""
    gateway.show(both_pod.view())
    where: str = both_pod.url if request.param == "pod" else gateway.url
    return where


class TestOpenAI:
    def test_sync(self, url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == [NAME]
            answer = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 37

    async def test_async_streams_side_by_side(self, url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def ask() -> tuple[str, Any]:
                text, usage = "", None
                stream = await client.chat.completions.create(
                    model=NAME,
                    messages=QUESTION,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for chunk in stream:
                    usage = chunk.usage or usage
                    if chunk.choices:
                        text += chunk.choices[0].delta.content or ""
                return text, usage

            answers = await asyncio.gather(*(ask() for _ in range(4)))
        assert len({text for text, _ in answers}) == 1
        assert "Paris" in answers[0][0]
        assert all(usage.completion_tokens > 3 for _, usage in answers)

    def test_completion_with_stop_echo_and_logprobs(self, url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            story = client.completions.create(
                model=NAME, prompt="Once upon a time", max_tokens=12, temperature=0, echo=True
            )
            assert story.choices[0].text.startswith("Once upon a time, the city of Nova Haven")
            cut = client.completions.create(
                model=NAME,
                prompt="Once upon a time",
                max_tokens=12,
                temperature=0,
                stop=[" Nova"],
                logprobs=3,
            )
        assert cut.choices[0].text == ", the city of"
        assert cut.choices[0].finish_reason == "stop"
        logprobs = cut.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        for token, value, top in zip(
            logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
        ):
            assert value is not None
            assert value <= 0
            assert top is not None
            assert top[token] == pytest.approx(value)
            assert max(top.values()) == pytest.approx(value), "greedy takes the likeliest"

    def test_its_exception_classes(self, url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError, match="served models: smollm2-135m"):
                client.completions.create(model="gpt-5", prompt="x")
            with pytest.raises(openai.BadRequestError, match="suffix is not supported yet") as bad:
                client.completions.create(model=NAME, prompt="x", suffix="y")
            assert bad.value.param == "suffix"
            with pytest.raises(openai.BadRequestError, match=r"context of \d{4} tokens") as long:
                client.completions.create(model=NAME, prompt="word " * 9000)
            assert long.value.code == "context_length_exceeded"
            assert "the prompt has 9001" in str(long.value)


def text_input(module: Any, text: str) -> Any:
    tensor = module.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize("where", ["pod", "gateway"])
def test_tritonclient(where: str, transport: str, both_pod: Any, gateway: Any) -> None:
    gateway.show(both_pod.view())
    server = both_pod if where == "pod" else gateway
    module: Any = triton_http if transport == "http" else triton_grpc
    port = server.port if transport == "http" else server.grpc_port
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    as_json = {"as_json": True} if transport == "grpc" else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.get_server_metadata(**as_json)["name"] == "tandem"
    assert client.get_model_metadata(NAME, **as_json)["platform"] == "tandem"
    config = client.get_model_config(NAME, **as_json)
    assert config.get("config", config)["model_transaction_policy"]["decoupled"] is True
    result = client.infer(
        NAME,
        [text_input(module, "Once upon a time")],
        parameters={"max_tokens": 6, "temperature": 0.0},
    )
    assert result.as_numpy("text_output")[0].decode().startswith(", the city of")
    statistics = client.get_inference_statistics(NAME, **as_json)["model_stats"][0]
    assert int(statistics["inference_count"]) >= 1
    with pytest.raises(InferenceServerException, match="'other' is not served here"):
        client.infer("other", [text_input(module, "x")])
    client.close()


def test_grpc_streaming(both_pod: Any, gateway: Any) -> None:
    gateway.show(both_pod.view())
    client = triton_grpc.InferenceServerClient(f"127.0.0.1:{gateway.grpc_port}")
    replies: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: replies.put((result, error)))
    flag = triton_grpc.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([True], dtype=bool))
    client.async_stream_infer(
        NAME,
        [text_input(triton_grpc, "Once upon a time"), flag],
        parameters={"max_tokens": 8, "temperature": 0.0},
        enable_empty_final_response=True,
    )
    pieces = []
    while True:
        result, error = replies.get(timeout=60)
        assert error is None
        response = result.get_response()
        if response.parameters["triton_final_response"].bool_param:
            break
        pieces.append(result.as_numpy("text_output")[0].decode())
    assert len(pieces) > 3
    assert "".join(pieces).startswith(", the city of Nova Haven")
    client.stop_stream()
    client.close()
