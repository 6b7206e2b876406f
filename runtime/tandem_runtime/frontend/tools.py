"""Tools of a chat: declared in the prompt by the model's template, called in its answer.

Two spellings of a call are known, told apart by what the template teaches the model:

- Hermes (Qwen too): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several in a row,
  with text around;
- Llama 3.1's JSON: the whole answer is `{"name": ..., "parameters": {...}}`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.frontend.stop import overlap
from tandem_runtime.frontend.structured import BLANKS

Json = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name
    arguments: str


class ToolCall(BaseModel):
    """A call in an earlier answer of the conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self, param: str) -> Json:
        """Templates write the arguments themselves, so they get the object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError as error:
            raise BadRequest(f"{param} has arguments that are not JSON: {error}.") from None
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


@dataclass(frozen=True)
class Spelling:
    """How a model writes calls."""

    arguments: str
    """The key beside `name`."""
    opens: str
    """Before a call; empty: it is the whole answer."""
    closes: str

    def grammar(self, functions: Sequence[Function]) -> str:
        """One call of any of these, and nothing else."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    self.arguments: function.parameters or {"type": "object"},
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for function in functions
        ]
        schema = json.dumps({"anyOf": calls, "x-guidance": BLANKS})
        if not self.opens:
            return f"start: %json {schema}\n"
        before, after = json.dumps(f"{self.opens}\n"), json.dumps(f"\n{self.closes}")
        return f"start: {before} call {after}\ncall: %json {schema}\n"


HERMES: Final = Spelling("arguments", _OPEN, _CLOSE)
LLAMA: Final = Spelling("parameters", "", "")


_LLAMA_SAYS: Final = '{"name": function name, "parameters": '


def spelling_of(template: str) -> Spelling:
    """Raises `BadRequest` for a template of neither."""
    plain = template.replace('\\"', '"')
    if _OPEN in plain and '"arguments": ' in plain:
        return HERMES
    if _LLAMA_SAYS in plain:
        return LLAMA
    raise BadRequest(
        "This model calls tools in a form that is not known here; leave tools out.", param="tools"
    )


class CallReader:
    """Text as it comes -> text for the user and calls. A call comes out when it is whole."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._held = ""
        self._inside = False
        self._began = False
        """Whether text was shown since the last call; line breaks before it are nobody's."""
        self.calls = 0

    def push(self, text: str, *, ended: bool) -> tuple[str, list[Json]]:
        """`ended`: nothing more comes. What was meant as a call and is none comes out as text."""
        self._held += text
        return self._marked(ended) if self._spelling.opens else self._whole(ended)

    def _shown(self, text: str) -> str:
        text = text if self._began or not self.calls else text.lstrip()
        self._began = self._began or bool(text)
        return text

    def _whole(self, ended: bool) -> tuple[str, list[Json]]:
        if not self._began and not ended and self._held.lstrip()[:1] in ("", "{"):
            return "", []
        text, self._held = self._held, ""
        call = self._call(text) if ended and not self._began else None
        return (self._shown(text), []) if call is None else ("", [call])

    def _marked(self, ended: bool) -> tuple[str, list[Json]]:
        shown = ""
        calls: list[Json] = []
        while True:
            marker = self._spelling.closes if self._inside else self._spelling.opens
            before, found, rest = self._held.partition(marker)
            if not found and (self._inside and not ended):
                return shown, calls
            if not found and not self._inside:
                keep = 0 if ended else overlap(before, marker)
                cut = len(before) - keep
                self._held = before[cut:]
                return shown + self._shown(before[:cut]), calls
            self._held = rest
            if self._inside:
                call = self._call(before)
                calls += [] if call is None else [call]
                wrong = f"{self._spelling.opens}{before}{found}"
                shown += self._shown(wrong) if call is None else ""
            else:
                shown += self._shown(before)
            self._inside = bool(found) and not self._inside

    def _call(self, text: str) -> Json | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        arguments = call.get(self._spelling.arguments, {}) if isinstance(call, Mapping) else None
        if not isinstance(arguments, Mapping) or not isinstance(call.get("name"), str):
            return None
        self.calls += 1
        self._began = False
        return {
            "index": self.calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": json.dumps(arguments, ensure_ascii=False),
            },
        }
