"""The OpenAI protocol over a scripted backend, by the unmodified client and by bare HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from tandem_runtime import contract
from tandem_runtime.frontend.errors import Unavailable
from tandem_runtime.protocol import GenerateEvent, Handoff, TokenLogprob


@pytest.fixture
async def http(served: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{served.url}/v1") as http:
        yield http


USER: list[Any] = [{"role": "user", "content": "Hi"}]


class TestModels:
    async def test_list_and_get(self, client: openai.AsyncOpenAI) -> None:
        models = await client.models.list()
        assert [(m.id, m.owned_by) for m in models.data] == [("small", "fleet-1")]
        assert (await client.models.retrieve("small")).id == "small"

    async def test_unknown(self, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="'org/other' is not served here") as error:
            await client.models.retrieve("org/other")
        assert error.value.code == "model_not_found"


class TestChat:
    async def test_answer_and_usage(
        self, client: openai.AsyncOpenAI, backend: Any, served: Any
    ) -> None:
        ids = backend.tokenizer.encode("Hello world")
        event = GenerateEvent(
            epoch=0, token_ids=tuple(ids), finish_reason="stop", prompt_tokens=9, cached_tokens=4
        )
        backend.script = lambda request: [event]
        answer = await client.chat.completions.create(model="small", messages=USER)
        assert answer.choices[0].message.content == "Hello world"
        assert answer.choices[0].finish_reason == "stop"
        prompt = backend.tokenizer.encode("user:Hi\nassistant:")
        assert backend.requests[0].prompt_ids == prompt
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        assert [record.finish_reason for record in served.records] == ["stop"]

    async def test_stream(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        backend.says("Hel", "lo", " world", finish_reason="length")
        stream = await client.chat.completions.create(
            model="small", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        *pieces, usage = chunks
        assert [c.choices[0].delta.content for c in pieces] == ["Hel", "lo", " world"]
        assert [c.choices[0].delta.role for c in pieces] == ["assistant", None, None]
        assert [c.choices[0].finish_reason for c in pieces] == [None, None, "length"]
        assert usage.choices == []
        assert usage.usage is not None
        assert usage.usage.completion_tokens == sum(
            len(backend.tokenizer.encode(t)) for t in ("Hel", "lo", " world")
        )
        assert len({c.id for c in chunks}) == 1

    async def test_parameters_reach_the_backend(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        await client.chat.completions.create(
            model="small",
            messages=USER,
            temperature=0.5,
            top_p=0.9,
            seed=-7,
            max_completion_tokens=5,
            user="me",
            extra_body={"ignore_eos": True, "stop_token_ids": [3], "cache_salt": "s"},
            extra_headers={contract.HEADER_TENANT: "acme"},
        )
        request = backend.requests[0]
        assert (request.tenant, request.cache_salt) == ("acme", "s")
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 5)
        assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (3,))
        assert sampling.seed == 2**63 - 7

    async def test_without_max_tokens_the_context_is_the_limit(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        await client.chat.completions.create(model="small", messages=USER)
        request = backend.requests[0]
        assert request.sampling.max_tokens == 200 - len(request.prompt_ids)

    async def test_two_requests_without_seed_differ(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        for _ in range(2):
            await client.chat.completions.create(model="small", messages=USER)
        first, second = backend.requests
        assert first.sampling.seed != second.sampling.seed
        assert first.stream_id != second.stream_id

    async def test_text_parts(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages: list[Any] = [{"role": "user", "content": parts}]
        await client.chat.completions.create(model="small", messages=messages)
        assert backend.requests[0].prompt_ids == backend.tokenizer.encode("user:ab\nassistant:")

    async def test_logprobs(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        [a], [b] = backend.tokenizer.encode("a"), backend.tokenizer.encode("b")
        chosen, other = TokenLogprob(a, -0.5), TokenLogprob(b, -1.5)
        backend.script = lambda request: [
            GenerateEvent(
                epoch=0,
                token_ids=(a,),
                logprobs=(chosen,),
                top_logprobs=((chosen, other),),
                finish_reason="stop",
            )
        ]
        answer = await client.chat.completions.create(
            model="small", messages=USER, logprobs=True, top_logprobs=2
        )
        assert backend.requests[0].sampling.logprobs == 2
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        [entry] = logprobs.content
        assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.5, [97])
        assert [(t.token, t.logprob) for t in entry.top_logprobs] == [("a", -0.5), ("b", -1.5)]

    async def test_a_model_without_template(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        backend.template = None
        with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
            await client.chat.completions.create(model="small", messages=USER)


class TestCompletions:
    async def test_defaults_and_echo(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        answer = await client.completions.create(model="small", prompt="Say: ", echo=True)
        assert answer.choices[0].text == "Say: Hello world"
        assert backend.requests[0].sampling.max_tokens == 16

    @pytest.mark.parametrize("stream", [False, True])
    async def test_prompts_of_every_kind(
        self, client: openai.AsyncOpenAI, backend: Any, stream: bool
    ) -> None:
        encode = backend.tokenizer.encode
        kinds: list[tuple[Any, list[list[int]]]] = [
            ("a b", [encode("a b")]),
            (["a", "b"], [encode("a"), encode("b")]),
            (encode("a b"), [encode("a b")]),
            ([encode("a"), encode("b c")], [encode("a"), encode("b c")]),
        ]
        for prompt, expected in kinds:
            backend.requests.clear()
            answer = await client.completions.create(model="small", prompt=prompt, stream=stream)
            texts = ["" for _ in expected]
            if stream:
                async for chunk in answer:
                    texts[chunk.choices[0].index] += chunk.choices[0].text
            else:
                texts = [choice.text for choice in answer.choices]
            assert texts == ["Hello world"] * len(expected)
            assert sorted(r.prompt_ids for r in backend.requests) == sorted(expected)

    async def test_choices_run_side_by_side(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        both_started = asyncio.Event()

        def script(request: Any) -> Any:
            if len(backend.requests) == 2:
                both_started.set()
            return [both_started, *_finish(backend, "x")]

        backend.script = script
        answer = await client.completions.create(model="small", prompt=["a", "b"])
        assert [choice.text for choice in answer.choices] == ["x", "x"]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 2

    async def test_one_failing_choice_ends_the_others(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        never = asyncio.Event()
        failing = backend.tokenizer.encode("a")
        backend.script = lambda request: (
            [Unavailable("no room")] if request.prompt_ids == failing else [never]
        )
        with pytest.raises(openai.InternalServerError, match="no room"):
            await client.completions.create(model="small", prompt=["a", "b"])
        assert len(backend.cancelled) == 2

    async def test_logprobs(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        ids = [backend.tokenizer.encode(c)[0] for c in "ab"]
        backend.script = lambda request: [
            GenerateEvent(
                epoch=0,
                token_ids=(i,),
                logprobs=(TokenLogprob(i, -float(n)),),
                top_logprobs=((TokenLogprob(ids[0], -0.25),),),
                finish_reason="length" if n == 1 else None,
            )
            for n, i in enumerate(ids)
        ]
        answer = await client.completions.create(model="small", prompt="x", logprobs=1)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["a", "b"]
        assert logprobs.token_logprobs == [0.0, -1.0]
        assert logprobs.text_offset == [0, 1]
        assert logprobs.top_logprobs == [{"a": -0.25}, {"a": -0.25, "b": -1.0}]


class TestStop:
    async def test_a_stop_string_across_tokens(
        self, client: openai.AsyncOpenAI, backend: Any, served: Any
    ) -> None:
        never = asyncio.Event()
        encode = backend.tokenizer.encode
        backend.script = lambda request: (
            [GenerateEvent(epoch=0, token_ids=tuple(encode(text))) for text in ("one E", "ND two")]
            + [never]
        )
        stream = await client.completions.create(
            model="small", prompt="x", stop=["END", "never"], stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].text for c in chunks) == "one "
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert len(backend.cancelled) == 1, "what is generated after the stop string is cancelled"
        assert served.records[0].finish_reason == "stop"

    async def test_held_text_comes_out_at_the_end(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        backend.says("one E", finish_reason="length")
        answer = await client.completions.create(model="small", prompt="x", stop="END")
        assert answer.choices[0].text == "one E"
        assert answer.choices[0].finish_reason == "length"

    async def test_half_a_character_at_the_end(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        half = backend.tokenizer.encode("é")[:1]
        backend.script = lambda request: [
            GenerateEvent(epoch=0, token_ids=tuple(half), finish_reason="length")
        ]
        answer = await client.completions.create(model="small", prompt="x")
        assert answer.choices[0].text == "�"


def _finish(backend: Any, text: str) -> list[GenerateEvent]:
    ids = tuple(backend.tokenizer.encode(text))
    return [GenerateEvent(epoch=0, token_ids=ids, finish_reason="stop")]


class TestTrace:
    HANDOFF = Handoff(prefill_pod="prefill-0", tokens=32, bytes=4096, duration_s=0.002)

    @pytest.mark.parametrize("include_usage", [False, True])
    async def test_stream(self, http: httpx.AsyncClient, backend: Any, include_usage: bool) -> None:
        ids = tuple(backend.tokenizer.encode("a"))
        backend.script = lambda request: [
            GenerateEvent(
                epoch=0, token_ids=ids, prompt_tokens=40, cached_tokens=8, handoff=self.HANDOFF
            ),
            GenerateEvent(epoch=0, token_ids=ids, finish_reason="stop"),
        ]
        body = {"model": "small", "prompt": "x", "stream": True}
        if include_usage:
            body["stream_options"] = {"include_usage": True}
        reply = await http.post("/completions", json=body, headers={contract.HEADER_TRACE: "1"})
        lines = [line for line in reply.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert all("tandem" not in chunk for chunk in chunks[:-1])
        trace = chunks[-1]["tandem"]
        assert trace["ttft_ms"] > 0
        assert trace["tpot_ms"] >= 0
        del trace["ttft_ms"], trace["tpot_ms"]
        assert trace == {
            "prefill_pod": "prefill-0",
            "decode_pod": "decode-0",
            "queue_ms": 0.0,
            "handoff_bytes": 4096,
            "handoff_ms": 2.0,
            "handoff_tokens": 32,
            "cached_tokens": 8,
            "attempts": 1,
        }

    async def test_body_and_only_when_asked(self, http: httpx.AsyncClient) -> None:
        body = {"model": "small", "prompt": "x"}
        traced = await http.post("/completions", json=body, headers={contract.HEADER_TRACE: "1"})
        assert traced.json()["tandem"]["decode_pod"] == "decode-0"
        assert "tandem" not in (await http.post("/completions", json=body)).json()


BAD: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("completions", {"prompt": "x", "n": 0}, "n: input should be greater than or equal to 1", "n"),
    ("completions", {"prompt": "x", "n": 17}, "n: input should be less than or equal to 16", "n"),
    ("completions", {"prompt": ["x"] * 99, "n": 3}, "99 prompts with n = 3 are 297 choices", "n"),
    ("completions", {"prompt": "x", "n": 2, "best_of": 3}, "best_of is not supported", "best_of"),
    ("completions", {"prompt": "x", "best_of": 3}, "all n = 1 choices are returned", "best_of"),
    ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a", None),
    ("completions", {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1: input should", None),
    (
        "completions",
        {"prompt": "x", "logit_bias": {"320": 1}},
        "logit_bias has the token id 320; this model's ids are 0 to 319",
        "logit_bias",
    ),
    ("completions", {"prompt": "x", "presence_penalty": 2.5}, "presence_penalty: input", None),
    ("completions", {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty: input", None),
    ("completions", {"prompt": "x", "top_k": -2}, "top_k: input should be greater", "top_k"),
    ("completions", {"prompt": "x", "min_p": 1.5}, "min_p: input should be less", "min_p"),
    ("completions", {"prompt": "x", "min_tokens": 17}, "at most 16 are generated", "min_tokens"),
    (
        "completions",
        {"prompt": "x", "guided_regex": "[a"},
        'The answer cannot be made to follow this: at 1(8): invalid regex "[a"',
        None,
    ),
    (
        "completions",
        {"prompt": "x", "guided_json": {"type": "thing"}},
        "The answer cannot be made to follow this: Invalid type: thing.",
        None,
    ),
    ("completions", {"prompt": "x", "guided_json": "{"}, "The JSON schema cannot be read", None),
    (
        "completions",
        {"prompt": "x", "guided_json": {"not": {"type": "string"}}},
        'cannot be made to follow this: Unimplemented keys: ["not"].',
        None,
    ),
    (
        "completions",
        {"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs takes one of",
        "structured_outputs",
    ),
    (
        "completions",
        {"prompt": "x", "structured_outputs": {"regex": "a"}, "guided_regex": "a"},
        "Send one of response_format and structured_outputs",
        None,
    ),
    (
        "completions",
        {"prompt": "x", "guided_regex": "a", "ignore_eos": True},
        "ends with it: leave out min_tokens and ignore_eos",
        "ignore_eos",
    ),
    ("completions", {"prompt": "x", "temprature": 1}, "temprature is not a parameter", None),
    ("completions", {}, "prompt is missing", "prompt"),
    ("completions", {"prompt": 5}, "prompt must be a string, a list of strings", "prompt"),
    ("completions", {"prompt": []}, "prompt must be a string", "prompt"),
    ("completions", {"prompt": ""}, "The prompt has no tokens", "prompt"),
    ("completions", {"prompt": [99999]}, "token id 99999; this model's ids are 0 to 319", None),
    ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens: input should be", "max_tokens"),
    ("completions", {"prompt": "x", "max_tokens": "9"}, "max_tokens: input should be", None),
    ("completions", {"prompt": "x", "temperature": -1}, "temperature: input should be", None),
    ("completions", {"prompt": "x", "top_p": 0}, "top_p: input should be greater than 0", None),
    ("completions", {"prompt": "x", "seed": 2**64}, "seed: input should be less", "seed"),
    ("completions", {"prompt": "x", "stop": 5}, "stop must be a string or a list", "stop"),
    ("completions", {"prompt": "x", "stop": ""}, "stop holds an empty string", "stop"),
    ("completions", {"prompt": "x", "echo": True, "logprobs": 1}, "echo with logprobs", "echo"),
    ("completions", {"prompt": "x", "stream_options": {}}, "needs stream: true", None),
    (
        "completions",
        {"prompt": "x", "max_tokens": 500},
        "context of 200 tokens; the prompt has 1 and max_tokens 500, together 501",
        "prompt",
    ),
    ("chat/completions", {"messages": []}, "messages: list should have at least 1", "messages"),
    (
        "chat/completions",
        {"messages": [{"role": "robot", "content": "x"}]},
        "messages.0.role: input should be 'system'",
        "messages.0.role",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content must be a string or a list of",
        "messages.0.content",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages.0.tool_calls.0.id is missing",
        "messages.0.tool_calls.0.id",
    ),
    ("chat/completions", {"messages": USER, "tools": [{}]}, "tools.0.type is missing", None),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content is missing", None),
    (
        "chat/completions",
        {"messages": USER, "response_format": {"type": "json_schema"}},
        "response_format needs json_schema with type json_schema",
        "response_format",
    ),
    (
        "chat/completions",
        {"messages": USER, "response_format": {"type": "xml"}},
        "response_format.type: input should be 'text', 'json_object' or 'json_schema'",
        None,
    ),
    ("chat/completions", {"messages": USER, "top_logprobs": 2}, "needs logprobs: true", None),
    (
        "chat/completions",
        {"messages": USER, "max_tokens": 3, "max_completion_tokens": 3},
        "not both",
        "max_tokens",
    ),
]


class TestErrors:
    @pytest.mark.parametrize(("path", "body", "sentence", "param"), BAD)
    async def test_bad_requests(
        self,
        http: httpx.AsyncClient,
        backend: Any,
        path: str,
        body: dict[str, Any],
        sentence: str,
        param: str | None,
    ) -> None:
        reply = await http.post(f"/{path}", json={"model": "small", **body})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert sentence in error["message"]
        assert error["type"] == "invalid_request_error"
        assert param is None or error["param"] == param
        assert backend.requests == []

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"{", "The body is not JSON"),
            (b"", "The body"),
            (b"\xff\xfe", "body"),
            (b"[1]", "The body: "),
            (b'{"model": "small", "prompt": "\\ud800"}', "prompt must be a string"),
            (b'{"model": "\\ud800", "prompt": "x", "\\udfff": 1}', "The body: "),
            (b"[" * 200_000, "body"),
        ],
    )
    async def test_malformed_bodies(
        self, http: httpx.AsyncClient, content: bytes, sentence: str
    ) -> None:
        headers = {"content-type": "application/json"}
        reply = await http.post("/completions", content=content, headers=headers)
        assert reply.status_code == 400, reply.text
        assert sentence in reply.json()["error"]["message"]

    @pytest.mark.parametrize("content_type", [None, "text/plain"])
    async def test_a_body_that_is_not_called_json(
        self, http: httpx.AsyncClient, content_type: str | None
    ) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        body = b'{"model": "small", "prompt": "x"}'
        reply = await http.post("/completions", content=body, headers=headers)
        assert reply.status_code == 400
        assert "with the header Content-Type: application/json" in reply.text

    async def test_classes_of_the_client(self, client: openai.AsyncOpenAI, backend: Any) -> None:
        with pytest.raises(openai.NotFoundError, match="served models: small"):
            await client.completions.create(model="big", prompt="x")
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="small", prompt="x " * 300)
        assert bad.value.code == "context_length_exceeded"
        backend.script = lambda request: [Unavailable("No pod is ready.", retry_after_s=2)]
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="No pod is ready") as busy:
                await client.completions.create(model="small", prompt="x", stream=stream)
            assert busy.value.status_code == 503
            assert busy.value.response.headers["retry-after"] == "2"

    async def test_the_client_retries_after_503(self, served: Any, backend: Any) -> None:
        answers = iter([[Unavailable("later", retry_after_s=0)], _finish(backend, "ok")])
        backend.script = lambda request: next(answers)
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=1
        ) as client:
            answer = await client.completions.create(model="small", prompt="x")
        assert answer.choices[0].text == "ok"

    async def test_a_stream_that_fails_later_ends_with_an_error_event(
        self, client: openai.AsyncOpenAI, backend: Any, served: Any
    ) -> None:
        ids = tuple(backend.tokenizer.encode("a"))
        backend.script = lambda request: [
            GenerateEvent(epoch=0, token_ids=ids),
            Unavailable("all pods are gone"),
        ]
        stream = await client.completions.create(model="small", prompt="x", stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="all pods are gone"):
            await anext(chunks)
        assert served.records[0].finish_reason is None

    async def test_a_fault_of_ours_is_a_500_without_details(
        self, http: httpx.AsyncClient, backend: Any
    ) -> None:
        backend.script = lambda request: [RuntimeError("secret detail")]
        for stream in (False, True):
            body = {"model": "small", "prompt": "x", "stream": stream}
            reply = await http.post("/completions", json=body)
            assert reply.status_code == 500
            assert "secret" not in reply.text
            assert reply.json()["error"]["type"] == "server_error"

    async def test_unknown_paths_and_methods(self, http: httpx.AsyncClient) -> None:
        missing = await http.get("/nothing")
        assert missing.status_code == 404
        assert "/v1/nothing" in missing.json()["error"]["message"]
        wrong = await http.get("/completions")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"

    async def test_too_large_a_body(self, http: httpx.AsyncClient) -> None:
        body = json.dumps({"model": "small", "prompt": "x" * (64 << 20)}).encode()
        reply = await http.post("/completions", content=body)
        assert reply.status_code == 413

        async def chunks() -> AsyncIterator[bytes]:
            yield body

        reply = await http.post("/completions", content=chunks())
        assert reply.status_code == 413

    @pytest.mark.parametrize("tenant", ["", "x" * 257])
    async def test_bad_tenant(self, http: httpx.AsyncClient, tenant: str) -> None:
        headers = {contract.HEADER_TENANT: tenant}
        body = {"model": "small", "prompt": "x"}
        reply = await http.post("/completions", json=body, headers=headers)
        assert reply.status_code == 400
        assert contract.HEADER_TENANT in reply.json()["error"]["message"]


class TestDisconnect:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("tokens_first", [False, True])
    async def test_a_client_that_leaves_cancels_its_stream(
        self, http: httpx.AsyncClient, backend: Any, served: Any, stream: bool, tokens_first: bool
    ) -> None:
        never = asyncio.Event()
        ids = tuple(backend.tokenizer.encode("a"))
        first = [GenerateEvent(epoch=0, token_ids=ids)] if tokens_first else []
        backend.script = lambda request: [*first, never]
        body = {"model": "small", "prompt": "x", "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/completions", json=body, timeout=2)
        await served.eventually(lambda: bool(backend.cancelled))
        assert [record.finish_reason for record in served.records] == [None]


async def test_openapi_document(served: Any) -> None:
    async with httpx.AsyncClient() as http:
        document = (await http.get(f"{served.url}/openapi.json")).json()
    assert "/v1/chat/completions" in document["paths"]
    assert "/v2/models/{model}/infer" in document["paths"]
