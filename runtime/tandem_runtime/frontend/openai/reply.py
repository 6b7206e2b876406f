"""Shapes of the OpenAI protocol: pieces of text -> choices of bodies and of stream chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from tandem_runtime.frontend.generation import Piece
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.frontend.tools import CallReader, Spelling
from tandem_runtime.protocol import TokenLogprob

Json = dict[str, Any]


@dataclass(frozen=True)
class Envelope:
    """The fields that all chunks of one answer share."""

    kind: str
    chunk_kind: str
    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def chat(cls, model: str) -> Envelope:
        chunk = "chat.completion.chunk"
        return cls("chat.completion", chunk, model, f"chatcmpl-{uuid.uuid4().hex}")

    @classmethod
    def completion(cls, model: str) -> Envelope:
        return cls("text_completion", "text_completion", model, f"cmpl-{uuid.uuid4().hex}")

    def body(self, choices: list[Json]) -> Json:
        return self._around(self.kind, choices)

    def chunk(self, choices: list[Json]) -> Json:
        return self._around(self.chunk_kind, choices)

    def _around(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class Shape(Protocol):
    """How one choice looks; has state, as a stream's first part differs from the others."""

    def part(self, index: int, piece: Piece) -> Json:
        """A choice of a stream chunk."""

    def whole(self, index: int, piece: Piece) -> Json:
        """The choice of a body; `piece` is the whole answer."""


class ChatShape:
    def __init__(self, tokenizer: Tokenizer, spelling: Spelling | None = None) -> None:
        """`spelling`: how the model writes tool calls, where it was told of tools."""
        self._tokenizer = tokenizer
        self._reader = None if spelling is None else CallReader(spelling)
        self._first: Json = {"role": "assistant"}

    def part(self, index: int, piece: Piece) -> Json:
        text, calls = self._read(piece)
        delta = {**self._first, "content": text, **({"tool_calls": calls} if calls else {})}
        self._first = {}
        return self._choice(index, "delta", delta, piece)

    def whole(self, index: int, piece: Piece) -> Json:
        text, calls = self._read(piece)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            # The index is the chunks'; a text of nothing is none.
            calls = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            message |= {"content": text.strip() or None, "tool_calls": calls}
        return self._choice(index, "message", message, piece)

    def _read(self, piece: Piece) -> tuple[str, list[Json]]:
        if self._reader is None:
            return piece.text, []
        return self._reader.push(piece.text, ended=piece.finish_reason is not None)

    def _choice(self, index: int, name: str, content: Json, piece: Piece) -> Json:
        called = piece.finish_reason == "stop" and self._reader is not None and self._reader.calls
        return {
            "index": index,
            name: content,
            "logprobs": self._logprobs(piece),
            "finish_reason": "tool_calls" if called else piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> Json | None:
        if not piece.logprobs:
            return None
        content = []
        for n, chosen in enumerate(piece.logprobs):
            top = piece.top_logprobs[n] if piece.top_logprobs else ()
            content.append({**self._entry(chosen), "top_logprobs": [self._entry(t) for t in top]})
        return {"content": content, "refusal": None}

    def _entry(self, token: TokenLogprob) -> Json:
        spelled = self._tokenizer.token_bytes(token.token_id)
        return {
            "token": spelled.decode("utf-8", errors="replace"),
            "logprob": token.logprob,
            "bytes": list(spelled),
        }


class CompletionShape:
    """`text_offset` counts characters of the returned text, `echo` included."""

    def __init__(self, tokenizer: Tokenizer, echo: str = "") -> None:
        self._tokenizer = tokenizer
        self._echo = echo
        self._offset = len(echo)

    def part(self, index: int, piece: Piece) -> Json:
        text = self._echo + piece.text
        self._echo = ""
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    whole = part

    def _logprobs(self, piece: Piece) -> Json | None:
        if not piece.logprobs:
            return None
        tokens = [self._tokenizer.token_text(chosen.token_id) for chosen in piece.logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [chosen.logprob for chosen in piece.logprobs],
            "top_logprobs": [self._top(n, piece) for n in range(len(tokens))],
            "text_offset": offsets,
        }

    def _top(self, n: int, piece: Piece) -> dict[str, float]:
        listed = piece.top_logprobs[n] if piece.top_logprobs else ()
        top: dict[str, float] = {}
        for token in (*listed, piece.logprobs[n]):
            # Two tokens may read alike (half characters): the likelier one names the entry.
            top.setdefault(self._tokenizer.token_text(token.token_id), token.logprob)
        return top
