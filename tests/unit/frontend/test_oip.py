"""The Open Inference Protocol over a scripted backend, by the unmodified tritonclient."""

from __future__ import annotations

import asyncio
import json
import queue
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tandem_runtime.frontend.errors import Unavailable
from tandem_runtime.protocol import GenerateEvent
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException


class Transport:
    """One of tritonclient's modules, and its blocking calls made from the test's loop."""

    def __init__(self, module: Any, url: str) -> None:
        self.module = module
        self.client = module.InferenceServerClient(url)
        self.thread = ThreadPoolExecutor(max_workers=1)  # gevent sockets stay in one thread

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method = partial(getattr(self.client, name), *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.thread, method)

    async def json(self, name: str, *args: Any) -> Any:
        extra = {"as_json": True} if self.module is triton_grpc else {}
        return await self.call(name, *args, **extra)

    def inputs(self, text: str, **others: Any) -> list[Any]:
        tensors = [self._bytes("text_input", text)]
        if "sampling" in others:
            tensors.append(self._bytes("sampling_parameters", json.dumps(others["sampling"])))
        if "stream" in others:
            flag = self.module.InferInput("stream", [1], "BOOL")
            flag.set_data_from_numpy(np.array([others["stream"]], dtype=bool))
            tensors.append(flag)
        return tensors

    def _bytes(self, name: str, value: str) -> Any:
        tensor = self.module.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value.encode()], dtype=np.object_))
        return tensor


@pytest.fixture(params=["http", "grpc"])
async def triton(request: pytest.FixtureRequest, served: Any) -> AsyncIterator[Transport]:
    if request.param == "http":
        transport = Transport(triton_http, served.url.removeprefix("http://"))
    else:
        transport = Transport(triton_grpc, served.grpc_url)
    yield transport
    await transport.call("close")
    transport.thread.shutdown()


class TestServer:
    async def test_health(self, triton: Transport, backend: Any) -> None:
        assert await triton.call("is_server_live")
        assert await triton.call("is_server_ready")
        assert await triton.call("is_model_ready", "small")
        assert await triton.call("is_model_ready", "small", "1")
        assert not await triton.call("is_model_ready", "other")
        assert not await triton.call("is_model_ready", "small", "7")
        backend.ready = False
        assert await triton.call("is_server_live")
        assert not await triton.call("is_server_ready")
        assert not await triton.call("is_model_ready", "small")

    async def test_metadata_and_config(self, triton: Transport) -> None:
        server = await triton.json("get_server_metadata")
        assert server["name"] == "tandem"
        assert {"binary_tensor_data", "generate", "statistics"} <= set(server["extensions"])
        model = await triton.json("get_model_metadata", "small")
        assert model["versions"] == ["1"]
        assert model["inputs"][0]["name"] == "text_input"
        assert [o["name"] for o in model["outputs"]] == ["text_output"]
        config = await triton.json("get_model_config", "small", "1")
        config = config.get("config", config)
        assert config["model_transaction_policy"] == {"decoupled": True}
        assert config["input"][0]["data_type"] == "TYPE_STRING"

    async def test_statistics_count_streams(self, triton: Transport, backend: Any) -> None:
        await triton.call("infer", "small", triton.inputs("x"))
        backend.script = lambda request: [Unavailable("no")]
        with pytest.raises(InferenceServerException):
            await triton.call("infer", "small", triton.inputs("x"))
        for arguments in ((), ("small",)):
            [model] = (await triton.json("get_inference_statistics", *arguments))["model_stats"]
            stats = model["inference_stats"]
            assert int(model["inference_count"]) == 1
            assert int(stats["success"]["count"]) == 1
            assert int(stats["success"]["ns"]) > 0
            assert int(stats["fail"]["count"]) == 1

    async def test_repository_index(self, triton: Transport, backend: Any) -> None:
        index = await triton.json("get_model_repository_index")
        index = index["models"] if isinstance(index, dict) else index
        assert [(m["name"], m["state"]) for m in index] == [("small", "READY")]
        backend.ready = False
        index = await triton.json("get_model_repository_index")
        index = index["models"] if isinstance(index, dict) else index
        assert index[0]["state"] == "UNAVAILABLE"

    async def test_what_we_do_not_have_is_refused_in_words(self, triton: Transport) -> None:
        with pytest.raises(InferenceServerException, match="not supported"):
            await triton.call("get_system_shared_memory_status")
        with pytest.raises(InferenceServerException, match="not supported"):
            await triton.call("register_system_shared_memory", "region", "key", 64)
        with pytest.raises(InferenceServerException, match=r"InferenceFleets|not supported"):
            await triton.call("load_model", "small")


class TestInfer:
    async def test_text_to_text(self, triton: Transport, backend: Any) -> None:
        result = await triton.call("infer", "small", triton.inputs("Say é"), request_id="r1")
        assert result.as_numpy("text_output").tolist() == [b"Hello world"]
        assert backend.requests[0].prompt_ids == backend.tokenizer.encode("Say é")
        assert backend.requests[0].sampling.max_tokens == 16
        response = result.get_response()
        assert (response["id"] if isinstance(response, dict) else response.id) == "r1"

    async def test_parameters_both_ways(self, triton: Transport, backend: Any) -> None:
        sampling = {"max_tokens": 7, "stop": ["world"], "seed": 3}
        result = await triton.call(
            "infer",
            "small",
            triton.inputs("x", sampling=sampling),
            parameters={"temperature": 0.5, "max_tokens": 9},
        )
        assert result.as_numpy("text_output").tolist() == [b"Hello "]
        chosen = backend.requests[0].sampling
        assert (chosen.max_tokens, chosen.temperature, chosen.seed) == (7, 0.5, 3)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"model_name": "big"}, "'big' is not served here; served models: small"),
            ({"model_version": "3"}, "has no version '3'"),
            ({"parameters": {"max_tokens": 0}}, "max_tokens: input should be"),
            ({"parameters": {"n": 2}}, "n is not a parameter"),
            ({"parameters": {"max_tokens": 500}}, "context of 200 tokens"),
        ],
    )
    async def test_errors(
        self, triton: Transport, backend: Any, change: dict[str, Any], sentence: str
    ) -> None:
        arguments = {"model_name": "small", "inputs": triton.inputs("x"), **change}
        with pytest.raises(InferenceServerException, match=sentence):
            await triton.call("infer", **arguments)
        assert backend.requests == []

    async def test_wrong_tensors(self, triton: Transport) -> None:
        number = triton.module.InferInput("text_input", [1], "FP32")
        number.set_data_from_numpy(np.zeros(1, dtype=np.float32))
        two = triton.module.InferInput("text_input", [2], "BYTES")
        two.set_data_from_numpy(np.array([b"a", b"b"], dtype=np.object_))
        stray = triton.inputs("x")[0]
        stray.set_data_from_numpy(np.array([b"\xff\xfe"], dtype=np.object_))
        unknown = triton.module.InferInput("image", [1], "BYTES")
        unknown.set_data_from_numpy(np.array([b"a"], dtype=np.object_))
        for inputs, sentence in (
            ([number], "datatype FP32 is not taken here"),
            ([two], "must be one BYTES value"),
            ([stray], "is not UTF-8"),
            ([*triton.inputs("x"), unknown], "'image' is not an input"),
            (triton.inputs("x", stream=True), "ModelStreamInfer"),
            (triton.inputs("x", stream=False)[1:], "text_input is missing"),
        ):
            with pytest.raises(InferenceServerException, match=sentence):
                await triton.call("infer", "small", inputs)

    async def test_an_output_we_do_not_have(self, triton: Transport) -> None:
        outputs = [triton.module.InferRequestedOutput("logits")]
        with pytest.raises(InferenceServerException, match="'logits' is not an output"):
            await triton.call("infer", "small", triton.inputs("x"), outputs=outputs)


class TestHttpOnly:
    @pytest.fixture
    async def http(self, served: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=f"{served.url}/v2/models/small") as http:
            yield http

    @pytest.mark.parametrize("binary_in", [False, True])
    @pytest.mark.parametrize("binary_out", [False, True])
    @pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
    async def test_encodings(
        self, served: Any, binary_in: bool, binary_out: bool, compression: str | None
    ) -> None:
        client = triton_http.InferenceServerClient(served.url.removeprefix("http://"))
        tensor = triton_http.InferInput("text_input", [1], "BYTES")
        value = np.array(["Say é"], dtype=np.object_)
        tensor.set_data_from_numpy(value, binary_data=binary_in)
        output = triton_http.InferRequestedOutput("text_output", binary_data=binary_out)
        result = await asyncio.to_thread(
            client.infer,
            "small",
            [tensor],
            outputs=[output],
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        client.close()
        got = result.as_numpy("text_output").tolist()
        assert got == [b"Hello world" if binary_out else "Hello world"]

    async def test_generate(self, http: httpx.AsyncClient, backend: Any) -> None:
        body = {"text_input": "x", "parameters": {"temperature": 0}, "max_tokens": 3}
        reply = await http.post("/generate", json=body)
        assert reply.json() == {
            "model_name": "small",
            "model_version": "1",
            "text_output": "Hello world",
        }
        sampling = backend.requests[0].sampling
        assert (sampling.temperature, sampling.max_tokens) == (0, 3)

    async def test_generate_stream(self, http: httpx.AsyncClient, backend: Any) -> None:
        backend.says("Hel", "lo")
        reply = await http.post("/versions/1/generate_stream", json={"text_input": "x"})
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.text.split("\n\n") if line]
        texts = [json.loads(line.removeprefix("data: "))["text_output"] for line in lines]
        assert texts == ["Hel", "lo"]

    async def test_generate_stream_errors(self, http: httpx.AsyncClient, backend: Any) -> None:
        backend.script = lambda request: [Unavailable("none")]
        reply = await http.post("/generate_stream", json={"text_input": "x"})
        assert (reply.status_code, reply.json()) == (503, {"error": "none"})
        ids = tuple(backend.tokenizer.encode("a"))
        backend.script = lambda request: [
            GenerateEvent(epoch=0, token_ids=ids),
            Unavailable("gone"),
        ]
        reply = await http.post("/generate_stream", json={"text_input": "x"})
        assert reply.status_code == 200
        assert reply.text.split("\n\n")[1] == 'data: {"error":"gone"}'

    @pytest.mark.parametrize(
        ("headers", "content", "sentence"),
        [
            ({}, b"{", "not what this endpoint takes"),
            ({}, b'{"inputs": 5}', "Expected `array`"),
            ({}, b'{"inputs": []}', "text_input is missing"),
            ({"Inference-Header-Content-Length": "99"}, b'{"inputs": []}', "the body has 14 bytes"),
            ({"Inference-Header-Content-Length": "-1"}, b'{"inputs": []}', "the body has 14 bytes"),
            ({"Content-Encoding": "br"}, b"x", "Content-Encoding br is not supported"),
            ({"Content-Encoding": "gzip"}, b"x", "The body is not gzip"),
            ({"Content-Encoding": "gzip"}, zlib.compress(b"{}")[:-4], "it is cut off"),
            ({"Content-Encoding": "gzip"}, zlib.compress(bytes(65 << 20)), "when decompressed"),
            (
                {},
                b'{"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", '
                b'"parameters": {"binary_data_size": 9}}]}',
                "binary_data_size is 9, 0 bytes are left",
            ),
            (
                {},
                b'{"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", '
                b'"parameters": {"shared_memory_region": "r"}}]}',
                "shared memory is not supported",
            ),
            (
                {},
                b'{"inputs": [{"name": "text_input", "shape": [2], "datatype": "BYTES", '
                b'"data": ["a"]}]}',
                "asks for 2 values, the request has 1",
            ),
        ],
    )
    async def test_malformed(
        self, http: httpx.AsyncClient, headers: dict[str, str], content: bytes, sentence: str
    ) -> None:
        reply = await http.post("/infer", content=content, headers=headers)
        assert reply.status_code == 400
        assert sentence in reply.json()["error"]

    async def test_bytes_that_belong_to_no_input(self, http: httpx.AsyncClient) -> None:
        head = b'{"inputs": []}'
        headers = {"Inference-Header-Content-Length": str(len(head))}
        reply = await http.post("/infer", content=head + b"zz", headers=headers)
        assert "2 bytes that belong to no input" in reply.json()["error"]


class TestGrpcStream:
    @pytest.fixture
    async def stream(self, served: Any) -> AsyncIterator[Stream]:
        stream = Stream(served.grpc_url)
        yield stream
        await asyncio.to_thread(stream.client.close)

    async def test_decoupled(self, stream: Stream, backend: Any) -> None:
        backend.says("Hel", "lo", " you")
        replies = await stream.ask(stream=True, empty_final=True)
        assert [text for text, _ in replies] == ["Hel", "lo", " you", None]
        assert [final for _, final in replies] == [False, False, False, True]

    async def test_without_the_empty_response(self, stream: Stream, backend: Any) -> None:
        backend.says("Hel", "lo")
        replies = await stream.ask(stream=True, empty_final=False, until=2)
        assert replies == [("Hel", False), ("lo", True)]

    async def test_without_stream_one_response(self, stream: Stream, backend: Any) -> None:
        backend.says("Hel", "lo")
        assert await stream.ask(stream=False, empty_final=False, until=1) == [("Hello", True)]

    async def test_errors_do_not_end_the_call(self, stream: Stream, backend: Any) -> None:
        with pytest.raises(InferenceServerException, match="'big' is not served here"):
            await stream.ask(model="big", stream=True, empty_final=False, until=1)
        backend.says("ok")
        assert await stream.ask(stream=True, empty_final=False, until=1) == [("ok", True)]

    async def test_closing_the_stream_cancels(
        self, stream: Stream, backend: Any, served: Any
    ) -> None:
        never = asyncio.Event()
        ids = tuple(backend.tokenizer.encode("a"))
        backend.script = lambda request: [GenerateEvent(epoch=0, token_ids=ids), never]
        assert await stream.ask(stream=True, empty_final=False, until=1) == [("a", False)]
        await asyncio.to_thread(stream.client.stop_stream, cancel_requests=True)
        await served.eventually(lambda: bool(backend.cancelled))


class Stream:
    """tritonclient's bidirectional stream with its callback."""

    def __init__(self, url: str) -> None:
        self.client = triton_grpc.InferenceServerClient(url)
        self._replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._started = False
        self._transport = Transport.__new__(Transport)
        self._transport.module = triton_grpc

    async def ask(
        self, *, stream: bool, empty_final: bool, model: str = "small", until: int = 0
    ) -> list[tuple[str | None, bool]]:
        return await asyncio.to_thread(self._ask, stream, empty_final, model, until)

    def _ask(
        self, stream: bool, empty_final: bool, model: str, until: int
    ) -> list[tuple[str | None, bool]]:
        if not self._started:
            self.client.start_stream(lambda result, error: self._replies.put((result, error)))
            self._started = True
        self.client.async_stream_infer(
            model,
            self._transport.inputs("x", stream=stream),
            enable_empty_final_response=empty_final,
        )
        replies: list[tuple[str | None, bool]] = []
        while True:
            result, error = self._replies.get(timeout=60)
            if error is not None:
                raise error
            response: service_pb2.ModelInferResponse = result.get_response()
            final = response.parameters["triton_final_response"].bool_param
            text = result.as_numpy("text_output")
            replies.append((None if text is None else text[0].decode(), final))
            if (empty_final and final) or len(replies) == until:
                return replies
