"""The endpoints of the OpenAI protocol over any backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from tandem_runtime import contract
from tandem_runtime.frontend.backend import Backend, ModelCard, ServedModel
from tandem_runtime.frontend.chat import ChatTemplateError
from tandem_runtime.frontend.contexts import Owner, Prefixes
from tandem_runtime.frontend.encode import encode
from tandem_runtime.frontend.errors import BadRequest, ModelNotFound
from tandem_runtime.frontend.generation import Generation, Observer, fit_prompt, run, tenant_of
from tandem_runtime.frontend.openai.answer import Answer, Choice
from tandem_runtime.frontend.openai.journal import AnswerJournal
from tandem_runtime.frontend.openai.opening import NOTHING, Opening
from tandem_runtime.frontend.openai.position import MAX_CHOICES, Position
from tandem_runtime.frontend.openai.reply import ChatShape, CompletionShape, Envelope, Shape
from tandem_runtime.frontend.openai.request import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from tandem_runtime.frontend.parameters import reseeded
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.respond import unary
from tandem_runtime.frontend.structured import check_grammar
from tandem_runtime.frontend.tools import Spelling, spelling_of
from tandem_runtime.protocol import Sampling

_COMPLETION_MAX_TOKENS: Final = 16
"""OpenAI's default for completions; a chat may fill the context."""


def router(
    backend: Backend, prefixes: Prefixes, observer: Observer, *, resumable: bool
) -> APIRouter:
    """Routes of /v1. `resumable`: another process like this one can go on with streams."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(card) for card in backend.cards()]}

    @routes.get("/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        cards = {card.name: card for card in backend.cards()}
        if name not in cards:
            raise ModelNotFound(name, list(cards))
        return _model(cards[name])

    @routes.post("/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        envelope = Envelope.completion(body.model)
        call = _Call(backend, prefixes, observer, body, request, envelope, resumable=resumable)
        return await call.respond(await _completion(call, body))

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        envelope = Envelope.chat(body.model)
        call = _Call(backend, prefixes, observer, body, request, envelope, resumable=resumable)
        return await call.respond(await _chat(call, body))

    return routes


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": card.fleet,
    }


@dataclass(frozen=True)
class Asked:
    """What is to be generated."""

    model: ServedModel
    prompts: Sequence[tuple[list[int], str]]
    """Token ids, and what the answer begins with."""
    sampling: Sampling
    shape: Callable[[str], Shape]
    """Of a choice that begins with that."""
    chat: bool = False
    tools: bool = False


class _Call:
    """One request on its way to its choices."""

    def __init__(
        self,
        backend: Backend,
        prefixes: Prefixes,
        observer: Observer,
        body: GenerationRequest,
        request: Request,
        envelope: Envelope,
        *,
        resumable: bool,
    ) -> None:
        self._envelope = envelope
        self._resumable = resumable and bool(body.stream)
        self._backend = backend
        self._prefixes = prefixes
        self._observer = observer
        self._body = body
        self._request = request
        self._arrived_s = time.monotonic()
        self._opening = NOTHING
        self._traced = request.headers.get(contract.HEADER_TRACE) == "1"
        self._tenant = tenant_of(request.headers.get(contract.HEADER_TENANT))
        body.refuse_what_is_not_served()

    async def model(self) -> ServedModel:
        return await self._backend.resolve(self._body.model)

    async def context(self, model: ServedModel) -> Opening:
        """What the prompt follows. Raises `ContextNotFound`, or `BadRequest`."""
        if self._body.context is None:
            return NOTHING
        owner = Owner(self._tenant, self._body.cache_salt or "")
        context = (await self._backend.contexts.find(self._body.context, owner)).context
        if context.fleet != model.card.fleet:
            raise BadRequest(
                f"The context '{context.id}' was made for model '{context.model}', not for "
                f"'{self._body.model}': send that model, or create a context for this one.",
                param="context",
            )
        self._opening = Opening(context, await self._prefixes.of(context, model))
        return self._opening

    def choices(self, asked: Asked) -> list[Choice]:
        """The `n` of each prompt."""
        count = self._body.choices
        if count * len(asked.prompts) > MAX_CHOICES:
            self._resumable = False
        made: list[Choice] = []
        for number, (prompt_ids, echo) in enumerate(asked.prompts):
            journal = self._journal(asked, echo)
            leader = None
            for n in range(count):
                sampling = reseeded(asked.sampling, n) if n else asked.sampling
                index = number * count + n
                shape = asked.shape(echo)
                choice = self._choice(
                    index, asked.model, prompt_ids, sampling, shape, leader, journal
                )
                leader = leader or choice
                made.append(choice)
        return made

    def _journal(self, asked: Asked, echo: str) -> bytes:
        """Of the streams of one prompt."""
        if not self._resumable:
            return b""
        return AnswerJournal(
            id=self._envelope.id,
            created=self._envelope.created,
            model=self._body.model,
            seed=asked.sampling.seed,
            prompt_tokens=tuple(len(prompt_ids) for prompt_ids, _ in asked.prompts),
            choices=self._body.choices,
            chat=asked.chat,
            tools=asked.tools,
            stop=self._body.stops(),
            echo=echo,
            include_usage=self._body.include_usage,
            traced=self._traced,
        ).encode()

    def _choice(
        self,
        index: int,
        model: ServedModel,
        prompt_ids: list[int],
        sampling: Sampling,
        shape: Shape,
        after: Choice | None,
        journal: bytes,
    ) -> Choice:
        generation = Generation(
            model=model,
            prompt_ids=prompt_ids,
            sampling=sampling,
            stop=self._body.stops(),
            tenant=self._tenant,
            cache_salt=self._body.cache_salt or "",
            context=self._body.context or "",
            begins=self._opening.named,
            stream_id=f"{self._envelope.id}.{index}",
            journal=journal,
        )
        record = StreamRecord(model.card.name, model.card.fleet, self._arrived_s)
        pieces = run(self._backend, generation, record, self._observer)
        return Choice(index, pieces, record, shape, after)

    async def respond(self, choices: list[Choice]) -> Response:
        position = Position.start(len(choices)) if self._resumable else None
        answer = Answer(self._envelope, choices, self._traced, position)
        if self._body.stream:
            return answer.stream(include_usage=self._body.include_usage)

        async def whole() -> Response:
            return JSONResponse(await answer.body())

        return await unary(self._request, whole())


async def _completion(call: _Call, body: CompletionRequest) -> list[Choice]:
    if body.echo and body.logprobs is not None:
        raise BadRequest("echo with logprobs is not supported yet; send one of them.", param="echo")
    model = await call.model()
    tokenizer = model.tokenizer
    grammar = await check_grammar(body.grammar())
    max_tokens = body.max_tokens or _COMPLETION_MAX_TOKENS
    sampling = body.sampling(tokenizer.bundle, max_tokens, body.logprobs, grammar)
    opening = await call.context(model)
    prompts: list[tuple[list[int], str]] = []
    for prompt in body.prompts():
        ids = await opening.prompt_ids(tokenizer, prompt)
        fit_prompt(model, ids, sampling.max_tokens)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        prompts.append((ids, text if body.echo else ""))
    return call.choices(Asked(model, prompts, sampling, partial(CompletionShape, tokenizer)))


async def _chat(call: _Call, body: ChatCompletionRequest) -> list[Choice]:
    logprobs = body.logprob_count()
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise BadRequest("Send max_completion_tokens or max_tokens, not both.", param="max_tokens")
    model = await call.model()
    opening = await call.context(model)
    text, spelling = _rendered(model, body, opening)
    ids = opening.prefix.ids + await encode(model.tokenizer, text, add_special_tokens=False)
    wanted = body.max_completion_tokens or body.max_tokens
    max_tokens = fit_prompt(model, ids, wanted, param="messages")
    grammar, demanded = body.grammar(), body.demanded()
    if spelling is not None and demanded:
        if grammar:
            raise BadRequest(
                "An answer cannot be a tool's call and follow another format: leave out "
                "response_format or tool_choice.",
                param="tool_choice",
            )
        grammar = spelling.grammar(demanded)
    await check_grammar(grammar)
    sampling = body.sampling(model.tokenizer.bundle, max_tokens, logprobs, grammar)

    def shape(echo: str) -> Shape:
        return ChatShape(model.tokenizer, spelling)

    tools = spelling is not None
    return call.choices(Asked(model, [(ids, "")], sampling, shape, chat=True, tools=tools))


def _rendered(
    model: ServedModel, body: ChatCompletionRequest, opening: Opening
) -> tuple[str, Spelling | None]:
    """The prompt behind what it follows, and how the model writes calls if it is told of tools."""
    if model.template is None:
        raise BadRequest(
            f"The model '{body.model}' has no chat template; use /v1/completions.", param="messages"
        )
    functions = [function.model_dump(exclude_none=True) for function in body.offered()]
    tools = [{"type": "function", "function": function} for function in functions]
    speaks_of_tools = any(m.role == "tool" or m.tool_calls for m in body.messages)
    if (tools or speaks_of_tools) and not model.template.takes_tools:
        raise BadRequest(
            f"The model '{body.model}' was not made for tools: its chat template has no place for "
            "them. Leave tools out, and messages of tools.",
            param="tools" if tools else "messages",
        )
    spelling = spelling_of(model.template.source) if tools else None
    messages = [m.for_template(f"messages.{n}") for n, m in enumerate(body.messages)]
    try:
        if opening.prefix.text:
            return opening.continued(model, messages, tools or None), spelling
        return model.template.render(messages, tools=tools or None), spelling
    except ChatTemplateError as error:
        raise BadRequest(f"{error}.", param="messages") from error
