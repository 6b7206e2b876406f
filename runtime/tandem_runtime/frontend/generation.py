"""One stream as the front end runs it: prompt ids in, pieces of text out.

A `Generation` is what the requests of all protocols become. Token ids turn into text here and
nowhere else, so a stream that moves between pods keeps half characters and stop strings.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from tandem_runtime import contract
from tandem_runtime.frontend.backend import Generates, ServedModel
from tandem_runtime.frontend.detokenize import Detokenizer
from tandem_runtime.frontend.errors import BadRequest, ContextTooLong, Internal
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.stop import StopStrings
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, Named, Sampling, TokenLogprob

_TENANT_CHARS: Final = 256

T = TypeVar("T")

Observer = Callable[[StreamRecord], None]
"""Told of each stream when it ended, however it ended."""


@dataclass(frozen=True)
class Generation:
    model: ServedModel
    prompt_ids: list[int]
    sampling: Sampling
    stop: tuple[str, ...]
    tenant: str
    cache_salt: str
    context: str = ""
    """Id of the named context that the prompt begins with."""
    begins: Named | None = None
    """How much of the prompt that is."""
    stream_id: str = ""
    """Empty: any."""
    journal: bytes = b""
    """What lets another gateway go on with the answer; empty: none can."""
    sent_tokens: int = 0
    """That the client has from another gateway: the pieces up to there are for the state alone."""


@dataclass(frozen=True)
class Piece:
    """What one event adds to the answer."""

    text: str
    tokens: int
    """Of the answer, up to and with this piece."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: str | None = None


def tenant_of(header: str | None) -> str:
    """The tenant that a request names."""
    if header is None:
        return contract.DEFAULT_TENANT
    if not header or len(header) > _TENANT_CHARS or not header.isprintable():
        raise BadRequest(
            f"{contract.HEADER_TENANT} must be 1 to {_TENANT_CHARS} printable characters."
        )
    return header


def fit_prompt(
    model: ServedModel, prompt_ids: list[int], max_tokens: int | None, param: str = "prompt"
) -> int:
    """Checks a prompt against the model; returns how many tokens may be generated.

    `max_tokens` None: as many as the context has room for. `param`: where the prompt came from.
    """
    if not prompt_ids:
        raise BadRequest("The prompt has no tokens; send at least one.", param=param)
    vocab_size = model.tokenizer.bundle.vocab_size
    outside = next((i for i in prompt_ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise BadRequest(
            f"The prompt has the token id {outside}; this model's ids are 0 to {vocab_size - 1}.",
            param=param,
        )
    room = model.context_tokens - len(prompt_ids)
    wanted = max(room, 1) if max_tokens is None else max_tokens
    if wanted > room:
        completion = "" if max_tokens is None else f" and max_tokens {max_tokens}"
        raise ContextTooLong(
            f"The model is served with a context of {model.context_tokens} tokens; the prompt has "
            f"{len(prompt_ids)}{completion}, together {len(prompt_ids) + wanted}. "
            "Shorten the prompt" + ("." if max_tokens is None else " or lower max_tokens."),
            param=param,
        )
    return wanted


async def run(
    backend: Generates, generation: Generation, record: StreamRecord, observer: Observer
) -> AsyncGenerator[Piece, None]:
    """Raises `ApiError`. Closing it cancels the stream; `observer` is told in any case."""
    record.prompt_tokens = len(generation.prompt_ids)
    record.tenant, record.context = generation.tenant, generation.context
    request = GenerateRequest(
        stream_id=generation.stream_id or uuid.uuid4().hex,
        epoch=0,
        prompt_ids=generation.prompt_ids,
        sampling=generation.sampling,
        tenant=generation.tenant,
        cache_salt=generation.cache_salt,
        context=generation.context,
        begins=generation.begins,
        journal=generation.journal,
    )
    text = _Text(generation)
    try:
        events = backend.generate(generation.model, request, record.route)
        async with aclosing(events):
            async for event in events:
                for part in _split(event, generation.sent_tokens - text.tokens):
                    if text.tokens < generation.sent_tokens:
                        record.replay(part)
                    else:
                        record.observe(part, time.monotonic())
                    piece = text.piece(part)
                    if piece.finish_reason is not None:
                        record.finish_reason = piece.finish_reason
                        # Usage and metrics are complete before the last piece is out.
                        _end(record, observer)
                        yield piece
                        return
                    if piece.text or piece.logprobs:
                        yield piece
            raise Internal("The stream ended without a finish; please report this.")
    finally:
        _end(record, observer)


def _end(record: StreamRecord, observer: Observer) -> None:
    if record.ended_s is None:
        record.ended_s = time.monotonic()
        observer(record)


def _split(event: GenerateEvent, tokens: int) -> list[GenerateEvent]:
    """The event's first `tokens` tokens and the others, as two where there are both."""
    first = event.token_ids[: max(0, tokens)]
    if not first:
        return [event]
    rest = event.token_ids[len(first) :]
    # Log probabilities of the first ones may not be known. Nobody is shown them again, but shapes
    # count the tokens that have some.
    before = msgspec.structs.replace(
        event,
        token_ids=first,
        logprobs=tuple(TokenLogprob(token_id, 0.0) for token_id in first),
        top_logprobs=(),
        finish_reason=None,
    )
    if not rest and event.finish_reason is None:
        return [before]
    after = msgspec.structs.replace(
        event,
        token_ids=rest,
        logprobs=_last(event.logprobs, len(rest)),
        top_logprobs=_last(event.top_logprobs, len(rest)),
    )
    return [before, after]


def _last(entries: tuple[T, ...], count: int) -> tuple[T, ...]:
    return entries[max(0, len(entries) - count) :]


class _Text:
    """Events -> pieces: detokenising, then stop strings."""

    tokens = 0
    """So far."""

    def __init__(self, generation: Generation) -> None:
        tokenizer = generation.model.tokenizer
        self._detokenizer = Detokenizer(tokenizer, generation.prompt_ids)
        self._stop = StopStrings(generation.stop)

    def piece(self, event: GenerateEvent) -> Piece:
        self.tokens += len(event.token_ids)
        shown, stopped = self._stop.push(self._detokenizer.push(event.token_ids))
        finish: str | None = event.finish_reason
        if finish is not None and not stopped:
            rest, stopped = self._stop.push(self._detokenizer.flush())
            shown += rest if stopped else rest + self._stop.flush()
        if stopped:
            finish = "stop"
        return Piece(
            shown, self.tokens, event.token_ids, event.logprobs, event.top_logprobs, finish
        )
