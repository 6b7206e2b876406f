"""The front end's backend on a pod: its own engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tandem_runtime.contract import Role
from tandem_runtime.frontend.backend import ModelCard, Route, ServedModel
from tandem_runtime.frontend.errors import (
    ApiError,
    BadRequest,
    Internal,
    ModelNotFound,
    Unavailable,
)
from tandem_runtime.protocol import GenerateEvent, GenerateRequest
from tandem_runtime.serve.contexts import PodContexts
from tandem_runtime.serve.lifecycle import Lifecycle
from tandem_runtime.serve.streams import StreamService


class LocalBackend:
    def __init__(
        self,
        pod: str,
        role: Role,
        models: Sequence[ServedModel],
        streams: StreamService,
        lifecycle: Lifecycle,
        contexts: PodContexts,
    ) -> None:
        self.contexts = contexts
        self._pod = pod
        self._role = role
        self._models = {model.card.name: model for model in models}
        self._streams = streams
        self._lifecycle = lifecycle

    @property
    def ready(self) -> bool:
        return self._lifecycle.admits and self._role is not Role.PREFILL

    def cards(self) -> Sequence[ModelCard]:
        return [model.card for model in self._models.values()]

    async def resolve(self, name: str) -> ServedModel:
        if name not in self._models:
            raise ModelNotFound(name, list(self._models))
        if self._role is Role.PREFILL:
            raise BadRequest(
                "This pod only computes prompts for decode pods; send requests to the gateway."
            )
        return self._models[name]

    async def generate(
        self, model: ServedModel, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        route.decode_pod, route.attempts = self._pod, 1
        async with aclosing(self._streams.generate(request)) as events:
            async for event in events:
                if event.error is not None:
                    raise api_error(event)
                yield event


def api_error(event: GenerateEvent) -> ApiError:
    """An error event as the front end's exception."""
    sentence = (event.error or "the stream failed").rstrip(".") + "."
    sentence = sentence[0].upper() + sentence[1:]
    if event.error_code == "bad_request":
        return BadRequest(sentence)
    return Unavailable(sentence) if event.retryable else Internal(sentence)
