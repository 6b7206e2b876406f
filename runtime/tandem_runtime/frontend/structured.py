"""Structured output: what a request wants the answer to be -> one grammar (llguidance's form).

The gateway checks a grammar so that a client reads at once what is wrong with it; the pods compile
it for their vocabulary.
"""

from __future__ import annotations

import asyncio
import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from llguidance import LLMatcher
from pydantic import BaseModel, ConfigDict, Field

from tandem_runtime.frontend.errors import BadRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Json = dict[str, Any]
_MAX_CHARS: Final = 1 << 18
JsonSchema = Json | bool | Annotated[str, Field(max_length=_MAX_CHARS)]
Source = Annotated[str, Field(max_length=_MAX_CHARS)]
Choices = Annotated[list[Source], Field(min_length=1, max_length=1024)]

BLANKS: Final[JsonCompileOptions] = {"whitespace_pattern": r"[ \n]{0,20}"}
"""Between JSON's tokens: a model left free to may write blanks for ever."""


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: JsonSchema | None = Field(None, alias="json")
    regex: Source | None = None
    choice: Choices | None = None
    grammar: Source | None = Field(None, description="In llguidance's Lark dialect.")
    json_object: bool | None = None

    def source(self) -> str:
        """Empty: any answer. Raises `BadRequest`."""
        asked = [
            *([] if self.json_schema is None else [json_grammar(self.json_schema)]),
            *([json_grammar({"type": "object"})] if self.json_object else []),
            *([] if self.regex is None else [LLMatcher.grammar_from_regex(self.regex)]),
            *([] if self.choice is None else [_one_of(self.choice)]),
            *([] if self.grammar is None else [LLMatcher.grammar_from_lark(self.grammar)]),
        ]
        if len(asked) > 1:
            raise BadRequest(
                "structured_outputs takes one of json, json_object, regex, choice, grammar.",
                param="structured_outputs",
            )
        return asked[0] if asked else ""


class NamedSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(max_length=256)]
    description: str | None = None
    json_schema: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    named: NamedSchema | None = Field(None, alias="json_schema")

    def source(self) -> str:
        """Empty: any answer. Raises `BadRequest`."""
        if (self.type == "json_schema") != (self.named is not None):
            raise BadRequest(
                "response_format needs json_schema with type json_schema, and only there.",
                param="response_format",
            )
        if self.type == "text":
            return ""
        schema = None if self.named is None else self.named.json_schema
        return json_grammar(schema or {"type": "object"})


def json_grammar(schema: Json | bool | str) -> str:
    """Raises `BadRequest`."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults=BLANKS)
    except ValueError as error:
        raise BadRequest(f"The JSON schema cannot be read: {error}.") from None


def _one_of(choices: list[str]) -> str:
    escaped = "|".join(re.escape(choice) for choice in choices)
    return LLMatcher.grammar_from_regex(f"({escaped})")


async def check_grammar(source: str) -> str:
    """`source`, where it can be compiled. Raises `BadRequest`."""
    reason = await asyncio.to_thread(_complaint, source) if source else ""
    if reason:
        raise BadRequest(f"The answer cannot be made to follow this: {reason.rstrip('.')}.")
    return source


@lru_cache(maxsize=256)
def _complaint(source: str) -> str:
    reason = LLMatcher.validate_grammar(source)
    # What follows is the grammar itself, with line numbers.
    return " ".join(reason.split("\n   1 | ")[0].split())
