"""Parameters of the OpenAI protocol on their way to the backend, and several choices."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.frontend.errors import Unavailable
from tandem_runtime.protocol import GenerateEvent, Sampling

USER: list[Any] = [{"role": "user", "content": "Hi"}]


def tokens(*ids: int) -> GenerateEvent:
    return GenerateEvent(epoch=0, token_ids=ids, prompt_tokens=1)


def finish(reason: Any, *ids: int) -> GenerateEvent:
    return GenerateEvent(epoch=0, token_ids=ids, finish_reason=reason, prompt_tokens=1)


class TestSampling:
    async def test_parameters_reach_the_backend(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        await client.chat.completions.create(
            model="small",
            messages=USER,
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            logit_bias={"7": 3, "8": -100},
            max_tokens=9,
            extra_body={
                "top_k": 5,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "min_tokens": 4,
                "stop_token_ids": [9],
            },
        )
        sampling = backend.requests[0].sampling
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.25)
        assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.2)
        assert sampling.logit_bias == ((7, 3), (8, -100))
        # What ends an answer is known here: a pod only has to hold it back.
        assert (sampling.min_tokens, sampling.stop_token_ids) == (4, (9, 0))
        assert sampling.needs_history

    async def test_what_asks_for_nothing_costs_nothing(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        nothing = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "min_tokens": 0}
        await client.chat.completions.create(
            model="small",
            messages=USER,
            presence_penalty=0,
            frequency_penalty=0,
            logit_bias={},
            n=1,
            response_format={"type": "text"},
            seed=1,
            extra_body=nothing,
        )
        sampling = backend.requests[0].sampling
        assert sampling == Sampling(max_tokens=sampling.max_tokens, seed=1)
        assert not sampling.adjusts_logits

    @pytest.mark.parametrize(
        ("asked", "text"),
        [
            ({"response_format": {"type": "json_object"}}, '{"a": [1]}'),
            (
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}},
                    }
                },
                "-12",
            ),
            ({"extra_body": {"structured_outputs": {"json": {"type": "null"}}}}, "null"),
            ({"extra_body": {"structured_outputs": {"json": '{"type": "null"}'}}}, "null"),
            ({"extra_body": {"structured_outputs": {"regex": "a|b+"}}}, "bbb"),
            ({"extra_body": {"structured_outputs": {"choice": ["a.c", "d"]}}}, "a.c"),
            ({"extra_body": {"structured_outputs": {"grammar": 'start: "x" /y+/'}}}, "xyy"),
            ({"extra_body": {"guided_json": {"type": "boolean"}}}, "true"),
            ({"extra_body": {"guided_regex": "a|b+"}}, "a"),
            ({"extra_body": {"guided_choice": ["yes", "no"]}}, "no"),
        ],
    )
    async def test_structured_outputs_become_a_grammar(
        self, client: openai.AsyncOpenAI, backend: Any, asked: dict[str, Any], text: str
    ) -> None:
        await client.chat.completions.create(model="small", messages=USER, **asked)
        sampling = backend.requests[0].sampling
        bundle = backend.tokenizer.bundle
        compiled = Grammars(bundle.tokenizer_json, bundle.vocab_size, bundle.eos_token_ids)
        grammar, output = compiled.compile(sampling.grammar), backend.tokenizer.encode(text)
        for n, token in enumerate(output):
            assert allows(grammar.allowed(output[:n]), token)
        assert allows(grammar.allowed(output), bundle.eos_token_ids[0])
        other = compiled.compile(sampling.grammar).allowed([])
        assert not allows(other, backend.tokenizer.encode("?")[0])


def allows(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


class TestSeveralChoices:
    async def test_each_choice_is_a_stream_with_its_own_seed(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        texts = ["one", "two", "three"]

        def script(request: Any) -> list[GenerateEvent]:
            ids = backend.tokenizer.encode(texts[len(backend.requests) - 1])
            return [finish("stop", *ids)]

        backend.script = script
        answer = await client.chat.completions.create(
            model="small", messages=USER, n=3, seed=5, temperature=0.5
        )
        assert sorted(c.index for c in answer.choices) == [0, 1, 2]
        assert sorted(str(c.message.content) for c in answer.choices) == sorted(texts)
        seeds = [request.sampling.seed for request in backend.requests]
        assert seeds[0] == 5
        assert len(set(seeds)) == 3
        assert len({request.stream_id for request in backend.requests}) == 3
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens == len(backend.tokenizer.encode("user:Hi\nassistant:"))
        assert usage.completion_tokens == sum(len(backend.tokenizer.encode(t)) for t in texts)
        backend.requests.clear()
        await client.chat.completions.create(
            model="small", messages=USER, n=3, seed=5, temperature=0.5
        )
        assert sorted(request.sampling.seed for request in backend.requests) == sorted(seeds)

    async def test_prompts_times_n_in_order_and_streamed(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        backend.script = lambda request: [tokens(*request.prompt_ids), finish("length")]
        stream = await client.completions.create(
            model="small",
            prompt=["a", "b"],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts: dict[int, str] = {}
        usage = None
        async for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert texts == {0: "a", 1: "a", 2: "b", 3: "b"}
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (2, 4)

    async def test_the_others_begin_when_the_prompt_is_computed(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        computed = asyncio.Event()
        [token] = backend.tokenizer.encode("x")
        backend.script = lambda request: [computed, tokens(token), finish("stop")]
        asking = asyncio.create_task(client.completions.create(model="small", prompt="a", n=4))
        while not backend.requests:  # noqa: ASYNC110 - what is awaited here has no event
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert len(backend.requests) == 1
        computed.set()
        assert len((await asking).choices) == 4

    async def test_the_first_ones_failure_is_the_answer(
        self, client: openai.AsyncOpenAI, backend: Any
    ) -> None:
        backend.script = lambda request: [Unavailable("nobody is here.")]
        with pytest.raises(openai.InternalServerError, match="nobody is here"):
            await client.completions.create(model="small", prompt="a", n=4)
        assert len(backend.requests) == 1
