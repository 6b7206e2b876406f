"""Tools of a chat: into the prompt, out of the answer, by the unmodified client."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.engine.grammar import Grammars
from tandem_runtime.frontend.chat import ChatTemplate
from tandem_runtime.frontend.tools import HERMES, LLAMA, CallReader, Spelling

LOOP = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ m.tool_call_id }}\n{% endfor %}"
)
TEMPLATES = {
    "hermes": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    '{# <tool_call>{"name": ..., "arguments": ...}</tool_call> #}' + LOOP,
    "llama": '{# {"name": function name, "parameters": ... #}'
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools | tojson }}" + LOOP,
    "other": "{{ tools }}" + LOOP,
    "none": LOOP,
}
USER: list[Any] = [{"role": "user", "content": "Hi"}]


def tool(name: str) -> Any:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather"), tool("time")]


@pytest.fixture
def model(backend: Any) -> Any:
    """`model("hermes")`: the backend's, with room for tools in its prompt."""
    backend.tokenizer = backend.tokenizer.__class__(
        backend.tokenizer.bundle.__class__(
            **{
                **{f: getattr(backend.tokenizer.bundle, f) for f in ("digest", "tokenizer_json")},
                "context_tokens": 4000,
                "vocab_size": backend.tokenizer.bundle.vocab_size,
                "eos_token_ids": (0,),
            }
        )
    )

    def use(name: str) -> None:
        backend.template = ChatTemplate(TEMPLATES[name], {})

    return use


def read(spelling: Spelling, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    reader, text, calls = CallReader(spelling), "", []
    for n, piece in enumerate(pieces):
        shown, found = reader.push(piece, ended=n + 1 == len(pieces))
        text += shown
        calls += found
    assert [call["index"] for call in calls] == list(range(len(calls)))
    functions = [call["function"] for call in calls]
    return text, [(f["name"], json.loads(f["arguments"])) for f in functions]


ONE = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool"}}\n</tool_call>'
ANSWERS: list[tuple[Spelling, str, str, list[tuple[str, Any]]]] = [
    (HERMES, "a < b <tool", "a < b <tool", []),
    (HERMES, ONE, "", [("f", {"x": "</tool"})]),
    (HERMES, f"Well. {ONE}\n{ONE}\n", "Well. ", [("f", {"x": "</tool"})] * 2),
    (HERMES, "<tool_call>f(1)</tool_call>!", "<tool_call>f(1)</tool_call>!", []),
    (HERMES, '<tool_call>{"name": "f"}', "", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    (HERMES, '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
    (LLAMA, ' \n{"name": "f", "parameters": {}}', "", [("f", {})]),
    (LLAMA, '{"a": 1}', '{"a": 1}', []),
    (LLAMA, "{[", "{[", []),
    (LLAMA, 'Sure: {"name": "f"}', 'Sure: {"name": "f"}', []),
    (LLAMA, "", "", []),
]


@pytest.mark.parametrize(("spelling", "answer", "text", "calls"), ANSWERS)
@given(cuts=st.sets(st.integers(0, 150)))
def test_however_the_answer_is_cut(
    spelling: Spelling, answer: str, text: str, calls: list[Any], cuts: set[int]
) -> None:
    at = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
    pieces = [answer[a:b] for a, b in pairwise(at)]
    assert read(spelling, pieces) == (text, calls)


def test_text_is_not_held_longer_than_it_may_be_a_call() -> None:
    reader = CallReader(HERMES)
    assert reader.push("a <to", ended=False) == ("a ", [])
    assert reader.push("ken>", ended=False) == ("<token>", [])
    assert CallReader(LLAMA).push("Hello", ended=False) == ("Hello", [])


@pytest.mark.parametrize("name", ["hermes", "llama"])
async def test_a_call_and_its_result(
    client: openai.AsyncOpenAI, backend: Any, model: Any, name: str
) -> None:
    model(name)
    call = {"name": "weather", "arguments" if name == "hermes" else "parameters": {"city": "Oslo"}}
    text = json.dumps(call)
    backend.says("<tool_call>", text, "</tool_call>") if name == "hermes" else backend.says(text)
    answer = await client.chat.completions.create(model="small", messages=USER, tools=TOOLS)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    [called] = choice.message.tool_calls
    assert called.type == "function"
    assert called.function.name == "weather"
    assert json.loads(called.function.arguments) == {"city": "Oslo"}
    assert '"weather"' in backend.tokenizer.decode(backend.requests[0].prompt_ids)
    assert backend.requests[0].sampling.grammar == ""

    backend.says("Cold.")
    result: Any = {"role": "tool", "tool_call_id": called.id, "content": "-5"}
    messages = [*USER, choice.message, result]
    answer = await client.chat.completions.create(model="small", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "Cold."
    assert answer.choices[0].finish_reason == "stop"
    prompt = backend.tokenizer.decode(backend.requests[1].prompt_ids)
    assert f'assistant:weather{{"city": "Oslo"}}\ntool:-5{called.id}\n' in prompt


async def test_streamed(client: openai.AsyncOpenAI, backend: Any, model: Any) -> None:
    model("hermes")
    backend.says("Let me", ' see.<tool_call>{"name": "time",', '"arguments": {}}</tool_', "call>")
    stream = await client.chat.completions.create(
        model="small", messages=USER, tools=TOOLS, stream=True
    )
    text, calls, reasons = "", [], []
    async for chunk in stream:
        [choice] = chunk.choices
        text += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reasons.append(choice.finish_reason)
    assert text == "Let me see."
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [(0, "time", "{}")]
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) <= {None}


@pytest.mark.parametrize("name", ["hermes", "llama"])
@pytest.mark.parametrize("choice", ["required", "time"])
async def test_a_demanded_call_is_a_grammar(
    client: openai.AsyncOpenAI, backend: Any, model: Any, name: str, choice: str
) -> None:
    model(name)
    named: Any = {"type": "function", "function": {"name": choice}}
    await client.chat.completions.create(
        model="small",
        messages=USER,
        tools=TOOLS,
        tool_choice="required" if choice == "required" else named,
    )
    bundle = backend.tokenizer.bundle
    grammar = backend.requests[0].sampling.grammar
    compiled = Grammars(bundle.tokenizer_json, bundle.vocab_size, bundle.eos_token_ids)

    def fits(called: str, city: str) -> bool:
        key = "arguments" if name == "hermes" else "parameters"
        text = json.dumps({"name": called, key: {"city": city}})
        if name == "hermes":
            text = f"<tool_call>\n{text}\n</tool_call>"
        ids = [*backend.tokenizer.encode(text), bundle.eos_token_ids[0]]
        follower = compiled.compile(grammar)
        masks = [follower.allowed(ids[:n]) for n in range(len(ids))]
        return all(mask[i // 8] >> i % 8 & 1 for mask, i in zip(masks, ids, strict=True))

    assert fits("time", "Rome")
    assert fits("weather", "Oslo") == (choice == "required")
    assert not fits("time", "Paris")
    assert not fits("other", "Oslo")


async def test_choice_none_says_nothing_of_tools(
    client: openai.AsyncOpenAI, backend: Any, model: Any
) -> None:
    model("hermes")
    backend.says(ONE)
    answer = await client.chat.completions.create(
        model="small", messages=USER, tools=TOOLS, tool_choice="none"
    )
    assert "weather" not in backend.tokenizer.decode(backend.requests[0].prompt_ids)
    assert answer.choices[0].message.content == ONE


@pytest.mark.parametrize(
    ("template", "asked", "sentence", "param"),
    [
        ("none", {"tools": TOOLS}, "was not made for tools: its chat template has no", "tools"),
        (
            "none",
            {"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]},
            "was not made for tools",
            "messages",
        ),
        ("other", {"tools": TOOLS}, "calls tools in a form that is not known here", "tools"),
        ("hermes", {"tool_choice": "required"}, "tool_choice needs tools", "tool_choice"),
        (
            "hermes",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice names 'x', no tool",
            "tool_choice",
        ),
        (
            "hermes",
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "leave out response_format or tool_choice",
            "tool_choice",
        ),
        (
            "hermes",
            {"tools": [tool("a b")]},
            "tools.0.function.name: string should match pattern",
            "tools.0.function.name",
        ),
        (
            "hermes",
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
                ],
                "tool_choice": "required",
            },
            "failed to compile JSON schema: Invalid type: x.",
            None,
        ),
        ("hermes", {"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice must be none,", None),
        (
            "hermes",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": "x",
                        "tool_calls": [
                            ANY := {
                                "id": "c",
                                "type": "function",
                                "function": {"name": "f", "arguments": "{"},
                            }
                        ],
                    }
                ]
            },
            "tool_calls is the assistant's alone",
            "messages.0",
        ),
        (
            "hermes",
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [ANY]}]},
            "messages.0.tool_calls.0 has arguments that are not JSON",
            None,
        ),
    ],
)
async def test_bad_requests(
    client: openai.AsyncOpenAI,
    backend: Any,
    model: Any,
    template: str,
    asked: dict[str, Any],
    sentence: str,
    param: str | None,
) -> None:
    model(template)
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(**{"model": "small", "messages": USER, **asked})
    assert sentence in bad.value.message
    assert param is None or bad.value.param == param
    assert backend.requests == []
