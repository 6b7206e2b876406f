"""Answers that follow a grammar, and what else a request may ask, from real pods of SmolLM2."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

NAME = "smollm2-135m"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 2},
        "kind": {"enum": ["capital", "town"]},
    },
    "required": ["city", "population", "rivers", "kind"],
    "additionalProperties": False,
}
ASK: list[Any] = [{"role": "user", "content": "Describe Paris as JSON."}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


@pytest.fixture(params=["pod", "gateway", "handoff"])
def client(
    request: pytest.FixtureRequest, both_pod: Any, split_pods: tuple[Any, Any], gateway: Any
) -> Any:
    """Straight to a pod, through the gateway, and over a prefill and a decode pod."""
    gateway.show(
        *(pod.view() for pod in (split_pods if request.param == "handoff" else [both_pod]))
    )
    url = both_pod.url if request.param == "pod" else gateway.url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_followed(client: openai.OpenAI, temperature: float) -> None:
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "response_format": FORMAT}
    answer = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=250, **asked)
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    stream = client.chat.completions.create(
        model=NAME, messages=ASK, max_tokens=250, stream=True, **asked
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == choice.message.content


def test_regex_and_choice(client: openai.OpenAI) -> None:
    def complete(prompt: str, **structured: Any) -> str:
        answer = client.completions.create(
            model=NAME, prompt=prompt, temperature=0, extra_body={"structured_outputs": structured}
        )
        return answer.choices[0].text

    assert re.fullmatch(
        r"[0-9]{4}-[01][0-9]", complete("The month is", regex=r"[0-9]{4}-[01][0-9]")
    )
    assert complete("Paris is in", choice=["Germany", "France"]) == "France"


def test_a_schema_that_cannot_be_followed(client: openai.OpenAI) -> None:
    wrong = {**FORMAT, "json_schema": {"name": "x", "schema": {"type": "thing"}}}
    with pytest.raises(openai.BadRequestError, match="Invalid type: thing"):
        client.chat.completions.create(model=NAME, messages=ASK, response_format=wrong)


def test_choices_penalties_and_a_seed(client: openai.OpenAI) -> None:
    def ask() -> Any:
        return client.completions.create(
            model=NAME,
            prompt="Once upon a time, in a small village by the sea,",
            n=3,
            max_tokens=12,
            seed=7,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={"0": -100},
            extra_body={"top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1},
        )

    first, second = ask(), ask()
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len({c.text for c in first.choices}) == 3
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.usage.completion_tokens <= 36
    assert first.usage.prompt_tokens == 13
