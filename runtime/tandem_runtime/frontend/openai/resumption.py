"""Going on with an answer whose gateway was lost: GET /v1/streams/ID.

The streams are read again from their first token, through the same detokeniser, stop strings and
shapes, and what the client has is left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Protocol

import msgspec
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from tandem_runtime import contract
from tandem_runtime.frontend.backend import Generates, ServedModel
from tandem_runtime.frontend.errors import StreamNotFound
from tandem_runtime.frontend.generation import Generation, Observer, Piece, run, tenant_of
from tandem_runtime.frontend.openai.answer import Answer, Choice
from tandem_runtime.frontend.openai.journal import AnswerJournal
from tandem_runtime.frontend.openai.position import Position
from tandem_runtime.frontend.openai.reply import ChatShape, CompletionShape, Envelope, Shape
from tandem_runtime.frontend.parameters import reseeded
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.tools import spelling_of
from tandem_runtime.protocol import GenerateRequest, HeldStream

_SUPERSEDED: Final[dict[int | str, dict[str, Any]]] = {
    409: {"description": "Another gateway goes on with the stream."}
}
_ID: Final = re.compile(r"(chatcmpl|cmpl)-[0-9a-f]{32}")


class Held(Generates, Protocol):
    """A stream that some pod has; `generate` takes it over, and begins with what it had so far."""

    @property
    def model(self) -> ServedModel:
        """The one that its token ids are of, under no name."""

    @property
    def stream(self) -> HeldStream: ...


class HeldAnswers(Generates, Protocol):
    async def held(self, answer: str, tenant: str) -> Sequence[Held]:
        """Its streams, as far as they are somewhere. Raises `Unavailable`."""

    def resumption_ended(self, outcome: str) -> None:
        """For the metrics: `resumed` or `not_found`."""


def router(backend: HeldAnswers, observer: Observer) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/streams/{id}", response_model=None, responses=_SUPERSEDED)
    async def resume(
        id: str, request: Request, last_event_id: Annotated[str, Header()] = ""
    ) -> Response:
        """The events behind `Last-Event-ID`."""
        tenant = tenant_of(request.headers.get(contract.HEADER_TENANT))
        held = await backend.held(id, tenant) if _ID.fullmatch(id) else []
        try:
            if not held:
                raise StreamNotFound(id)
            answer, include_usage = _answer(id, held, last_event_id, backend, observer)
        except StreamNotFound:
            backend.resumption_ended("not_found")
            raise
        backend.resumption_ended("resumed")
        return answer.stream(include_usage=include_usage)

    return routes


def _answer(
    id_: str, held: Sequence[Held], event_id: str, backend: Generates, observer: Observer
) -> tuple[Answer, bool]:
    """Raises `StreamNotFound` where something of it is lost."""
    try:
        journal = AnswerJournal.decode(held[0].stream.request.journal)
    except msgspec.MsgspecError:
        raise StreamNotFound(id_) from None
    position = Position.parse(event_id, journal.choices * len(journal.prompt_tokens))
    rebuild = _Rebuild(journal, held, position, backend, observer)
    choices: list[Choice] = []
    for index in range(len(position.sent)):
        number = index % journal.choices
        leader = choices[index - number] if number else None
        choices.append(rebuild.choice(index, leader))
        choices[-1].began.set()
    kind = Envelope.chat if journal.chat else Envelope.completion
    envelope = replace(kind(journal.model), id=id_, created=journal.created)
    return Answer(envelope, choices, journal.traced, position), journal.include_usage


class _Rebuild:
    def __init__(
        self,
        journal: AnswerJournal,
        held: Sequence[Held],
        position: Position,
        backend: Generates,
        observer: Observer,
    ) -> None:
        self._journal = journal
        self._position = position
        self._backend = backend
        self._observer = observer
        self._arrived_s = time.monotonic()
        self._held = {int(one.stream.request.stream_id.rpartition(".")[2]): one for one in held}

    def choice(self, index: int, leader: Choice | None) -> Choice:
        """Raises `StreamNotFound`."""
        sent = self._position.sent[index]
        source = self._held.get(index)
        if sent.finished:
            record = self._record(index, next(iter(self._held.values())))
            record.replayed_tokens = sent.tokens
            shape = self._shape(source or next(iter(self._held.values())))
            return Choice(index, _nothing(), record, shape, leader)
        if source is not None:
            return self._taken_over(index, source, leader)
        if sent.tokens:
            raise StreamNotFound(self._journal.id)
        return self._begun_anew(index, leader)

    def _taken_over(self, index: int, source: Held, leader: Choice | None) -> Choice:
        request, so_far = source.stream.request, source.stream.so_far
        sent_tokens = self._position.sent[index].tokens
        fresh_tokens = len(so_far.token_ids) - sent_tokens
        wanted = 0 if request.sampling.logprobs is None else fresh_tokens
        if fresh_tokens < 0 or len(so_far.logprobs) < wanted:
            raise StreamNotFound(self._journal.id)
        generation = self._generation(request, source, sent_tokens)
        return self._choice(index, source, source, generation, leader)

    def _begun_anew(self, index: int, leader: Choice | None) -> Choice:
        """It had not reached a pod yet, and another choice of the same prompt had."""
        count = self._journal.choices
        siblings = range(index // count * count, (index // count + 1) * count)
        source = next((self._held[n] for n in siblings if n in self._held), None)
        if source is None:
            raise StreamNotFound(self._journal.id)
        request = source.stream.request
        sampling = msgspec.structs.replace(request.sampling, seed=self._journal.seed)
        if index % count:
            sampling = reseeded(sampling, index % count)
        stream_id = f"{self._journal.id}.{index}"
        request = msgspec.structs.replace(request, stream_id=stream_id, sampling=sampling)
        generation = self._generation(request, source, 0)
        return self._choice(index, source, self._backend, generation, leader)

    def _choice(
        self,
        index: int,
        source: Held,
        generates: Generates,
        generation: Generation,
        leader: Choice | None,
    ) -> Choice:
        record = self._record(index, source)
        record.taken_over = generates is source
        pieces = run(generates, generation, record, self._observer)
        return Choice(index, pieces, record, self._shape(source), leader)

    def _generation(self, request: GenerateRequest, source: Held, sent_tokens: int) -> Generation:
        return Generation(
            model=source.model,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            stop=self._journal.stop,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            context=request.context,
            begins=request.begins,
            stream_id=request.stream_id,
            journal=request.journal,
            sent_tokens=sent_tokens,
        )

    def _record(self, index: int, source: Held) -> StreamRecord:
        record = StreamRecord(self._journal.model, source.model.card.fleet, self._arrived_s)
        record.prompt_tokens = self._journal.prompt_tokens[index // self._journal.choices]
        return record

    def _shape(self, source: Held) -> Shape:
        tokenizer, template = source.model.tokenizer, source.model.template
        if not self._journal.chat:
            echo = AnswerJournal.decode(source.stream.request.journal).echo
            return CompletionShape(tokenizer, echo)
        told = self._journal.tools and template is not None
        return ChatShape(tokenizer, spelling_of(template.source) if told and template else None)


async def _nothing() -> AsyncGenerator[Piece, None]:
    return
    yield
