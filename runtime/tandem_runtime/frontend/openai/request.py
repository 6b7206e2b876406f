"""Requests of the OpenAI protocol: their fields, and what we do not serve yet.

A field that would change the answer is served or refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.frontend.parameters import GenerationParameters, MaxTokens, Text, TokenId
from tandem_runtime.frontend.structured import (
    Choices,
    JsonSchema,
    ResponseFormat,
    Source,
    StructuredOutputs,
)
from tandem_runtime.frontend.tools import Function, NamedTool, Tool, ToolCall, ToolChoice

_MAX_PROMPTS: Final = 256
MAX_CHOICES: Final = 16

_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "suffix": ("",),
    "web_search_options": (),
}
"""Not served yet: refused, unless the value (or null) asks for nothing."""

_WITHOUT_EFFECT: Final = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "verbosity",
    }
)
"""Bookkeeping of the hosted service: no answer depends on it."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(GenerationParameters):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Annotated[str, Field(max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: JsonSchema | None = Field(None, description="vLLM's older structured_outputs.")
    guided_regex: Source | None = None
    guided_choice: Choices | None = None
    guided_grammar: Source | None = None
    user: str | None = None
    context: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="Extension: id of the context (/v1/contexts) that the prompt follows."
    )

    def refuse_what_is_not_served(self) -> None:
        """Raises `BadRequest` that names the first such parameter."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT or _asks_for_nothing(name, value):
                continue
            if name in _NEUTRAL:
                raise BadRequest(f"{name} is not supported yet; leave it out.", param=name)
            raise BadRequest(f"{name} is not a parameter of this endpoint.", param=name)
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options needs stream: true.", param="stream_options")
        if self.best_of not in (None, self.choices):
            raise BadRequest(
                f"best_of is not supported: all n = {self.choices} choices are returned; leave it "
                "out.",
                param="best_of",
            )

    @property
    def choices(self) -> int:
        """For each prompt."""
        return self.n or 1

    def grammar(self) -> str:
        older = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        wanted = self.response_format
        asked = [super().grammar(), older.source(), "" if wanted is None else wanted.source()]
        if sum(map(bool, asked)) > 1:
            raise BadRequest(
                "Send one of response_format and structured_outputs.", param="response_format"
            )
        return "".join(asked)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _asks_for_nothing(name: str, value: object) -> bool:
    neutral = _NEUTRAL.get(name, ())
    return any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=_MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry for each choice: text, or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def refuse_what_is_not_served(self) -> None:
        super().refuse_what_is_not_served()
        asked = len(self.prompts()) * self.choices
        if asked > _MAX_PROMPTS:
            raise BadRequest(
                f"{len(self.prompts())} prompts with n = {self.choices} are {asked} choices; at "
                f"most {_MAX_PROMPTS} are generated together.",
                param="n",
            )


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None

    def for_template(self, param: str) -> dict[str, Any]:
        """`param`: where the message is. Raises `BadRequest`."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": text}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            message["tool_calls"] = [c.for_template(f"{param}.tool_calls.{n}") for n, c in calls]
        return message

    def check(self, param: str) -> None:
        """Raises `BadRequest`."""
        if self.tool_calls and self.role != "assistant":
            raise BadRequest(f"{param}.tool_calls is the assistant's alone.", param=param)
        if self.content is None and not self.tool_calls:
            raise BadRequest(f"{param}.content is missing.", param=f"{param}.content")
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], ""):
                where = f"{param}.{name}"
                raise BadRequest(f"{where} is not supported yet; leave it out.", param=where)


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def offered(self) -> list[Function]:
        """The functions that the model is told of. Raises `BadRequest`."""
        functions = [tool.function for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not functions:
            raise BadRequest("tool_choice needs tools.", param="tool_choice")
        return [] if self.tool_choice == "none" else functions

    def demanded(self) -> list[Function]:
        """Those of which one must be called. Raises `BadRequest`."""
        if not isinstance(self.tool_choice, NamedTool):
            return self.offered() if self.tool_choice == "required" else []
        name = self.tool_choice.function.name
        named = [function for function in self.offered() if function.name == name]
        if not named:
            raise BadRequest(f"tool_choice names '{name}', no tool.", param="tool_choice")
        return named

    def logprob_count(self) -> int | None:
        """`Sampling.logprobs`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_what_is_not_served(self) -> None:
        super().refuse_what_is_not_served()
        for n, message in enumerate(self.messages):
            message.check(f"messages.{n}")
