"""The endpoints of the OpenAI protocol over any backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from tandem_runtime import contract
from tandem_runtime.frontend.backend import Backend, ModelCard, ServedModel
from tandem_runtime.frontend.chat import ChatTemplateError
from tandem_runtime.frontend.contexts import Owner, Prefixes
from tandem_runtime.frontend.encode import encode
from tandem_runtime.frontend.errors import ApiError, BadRequest, ModelNotFound
from tandem_runtime.frontend.generation import Generation, Observer, fit_prompt, run, tenant_of
from tandem_runtime.frontend.openai.answer import Answer, Choice
from tandem_runtime.frontend.openai.opening import NOTHING, Opening
from tandem_runtime.frontend.openai.reply import ChatShape, CompletionShape, Envelope, Shape
from tandem_runtime.frontend.openai.request import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from tandem_runtime.frontend.parameters import reseeded
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.respond import EventStream, unary
from tandem_runtime.frontend.structured import check_grammar
from tandem_runtime.frontend.tools import Spelling, spelling_of
from tandem_runtime.protocol import Sampling

_DONE: Final = b"data: [DONE]\n\n"
_COMPLETION_MAX_TOKENS: Final = 16
"""OpenAI's default for completions; a chat may fill the context."""


def router(backend: Backend, prefixes: Prefixes, observer: Observer) -> APIRouter:
    """Routes of /v1."""
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
        call = _Call(backend, prefixes, observer, body, request)
        return await call.respond(Envelope.completion(body.model), await _completion(call, body))

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        call = _Call(backend, prefixes, observer, body, request)
        return await call.respond(Envelope.chat(body.model), await _chat(call, body))

    return routes


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": card.fleet,
    }


class _Call:
    """One request on its way to its choices."""

    def __init__(
        self,
        backend: Backend,
        prefixes: Prefixes,
        observer: Observer,
        body: GenerationRequest,
        request: Request,
    ) -> None:
        self._backend = backend
        self._prefixes = prefixes
        self._observer = observer
        self._body = body
        self._request = request
        self._arrived_s = time.monotonic()
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
        return Opening(context, await self._prefixes.of(context, model))

    def choice(
        self,
        index: int,
        model: ServedModel,
        prompt_ids: list[int],
        sampling: Sampling,
        shape: Shape,
        after: Choice | None = None,
    ) -> Choice:
        generation = Generation(
            model=model,
            prompt_ids=prompt_ids,
            sampling=sampling,
            stop=self._body.stops(),
            tenant=self._tenant,
            cache_salt=self._body.cache_salt or "",
            context=self._body.context or "",
        )
        record = StreamRecord(model.card.name, model.card.fleet, self._arrived_s)
        pieces = run(self._backend, generation, record, self._observer)
        return Choice(index, pieces, record, shape, after)

    def choices(
        self,
        first: int,
        model: ServedModel,
        prompt_ids: list[int],
        sampling: Sampling,
        shape: Callable[[], Shape],
    ) -> list[Choice]:
        """The `n` of one prompt, the first one's index being `first`."""
        leader = self.choice(first, model, prompt_ids, sampling, shape())
        return [
            leader,
            *(
                self.choice(first + n, model, prompt_ids, reseeded(sampling, n), shape(), leader)
                for n in range(1, self._body.choices)
            ),
        ]

    async def respond(self, envelope: Envelope, choices: list[Choice]) -> Response:
        traced = self._request.headers.get(contract.HEADER_TRACE) == "1"
        answer = Answer(envelope, choices, traced)
        if self._body.stream:
            chunks = answer.chunks(include_usage=self._body.include_usage)
            return EventStream(chunks, ApiError.openai, last=_DONE)

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
    choices: list[Choice] = []
    for prompt in body.prompts():
        ids = await opening.prompt_ids(tokenizer, prompt)
        fit_prompt(model, ids, sampling.max_tokens)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        shape = partial(CompletionShape, tokenizer, text if body.echo else "")
        choices += call.choices(len(choices), model, ids, sampling, shape)
    return choices


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
    return call.choices(0, model, ids, sampling, partial(ChatShape, model.tokenizer, spelling))


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
