"""What the front end needs of whoever computes tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem_runtime.frontend.chat import ChatTemplate
from tandem_runtime.frontend.contexts import ContextView, Owner
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.protocol import Context, GenerateEvent, GenerateRequest, TokenizerBundle


@dataclass(frozen=True)
class ModelCard:
    """A served name, without what it takes to use it."""

    name: str
    fleet: str
    created_unix_s: int


@dataclass(frozen=True)
class ServedModel:
    """A served name with what turns its text into ids and back."""

    card: ModelCard
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context_tokens: int
    """The longest prompt and answer together that is served."""

    @classmethod
    def of(cls, card: ModelCard, bundle: TokenizerBundle) -> ServedModel:
        source = bundle.chat_template
        template = None if source is None else ChatTemplate(source, bundle.special_tokens)
        return cls(card, Tokenizer(bundle), template, bundle.context_tokens)


@dataclass
class Route:
    """Where a stream went; the backend keeps it current while the stream runs."""

    decode_pod: str = ""
    prefill_pod: str = ""
    attempts: int = 0


class Contexts(Protocol):
    """The named contexts that a backend keeps."""

    async def create(self, context: Context) -> ContextView:
        """Raises `BadRequest` where it cannot be kept as it asks, `Unavailable` where nobody can
        keep it now."""

    async def find(self, id_: str, owner: Owner) -> ContextView:
        """Raises `ContextNotFound`, whatever the reason is."""

    async def owned(self, owner: Owner) -> list[ContextView]:
        """Newest first."""

    async def change(self, context: Context) -> ContextView:
        """Take in a newer version, which says until when it is kept, or that it is deleted."""


class Generates(Protocol):
    def generate(
        self, model: ServedModel, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The stream's events up to its finish. Never an event with `error`: raises `ApiError`.

        `request.prefill` is not set by the caller. Closing the generator cancels the stream.
        """


class Backend(Generates, Protocol):
    @property
    def contexts(self) -> Contexts: ...

    @property
    def ready(self) -> bool:
        """Whether clients should come: requests are admitted, and will be for a while.

        What is not admitted any more is refused by `generate`.
        """

    def cards(self) -> Sequence[ModelCard]:
        """All served names; those without a ready pod too."""

    async def resolve(self, name: str) -> ServedModel:
        """Raises `ModelNotFound`, or `Unavailable` where no pod can be asked yet."""
