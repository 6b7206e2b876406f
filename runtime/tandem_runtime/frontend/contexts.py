"""Named contexts apart from HTTP: whose they are, how long, and the tokens that they stand for.

A context is a prefix. Its tokens come first in a prompt, so its KV is found by the same keys as any
other prefix; a context that nobody keeps any more costs its prefill, never a wrong answer.
"""

from __future__ import annotations

import asyncio
import datetime
import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tandem_runtime.frontend.chat import ChatTemplateError
from tandem_runtime.frontend.encode import encode
from tandem_runtime.frontend.errors import BadRequest, Unavailable
from tandem_runtime.protocol import Context, ContextCopy

if TYPE_CHECKING:
    from tandem_runtime.frontend.backend import ServedModel

MOST: Final = 10_000
"""Contexts that a process knows."""
MOST_CHARS: Final = 1 << 28
"""Of their contents together."""
_PREPARED_TOKENS: Final = 4 << 20
"""Whose ids are remembered; others are encoded again."""


@dataclass(frozen=True)
class Owner:
    """Whose requests may use a context."""

    tenant: str
    cache_salt: str

    @classmethod
    def of(cls, context: Context) -> Owner:
        return cls(context.tenant, context.cache_salt)


@dataclass(frozen=True)
class ContextView:
    """A context and what pods have of it."""

    context: Context
    copies: tuple[ContextCopy, ...] = ()

    @property
    def status(self) -> str:
        """`ready` once a pod keeps it, `failed` when all that tried could not, else `building`."""
        states = {copy.state for copy in self.copies}
        if "ready" in states:
            return "ready"
        return "failed" if states == {"failed"} else "building"

    @property
    def reason(self) -> str:
        return next((copy.reason for copy in self.copies if copy.reason), "")

    @property
    def tokens(self) -> int:
        """As a pod that keeps it counts them; before one does, as of its creation."""
        return next((copy.tokens for copy in self.copies if copy.tokens), self.context.tokens)

    @property
    def tier(self) -> str:
        """Where it is kept, or is to be."""
        return next((copy.tier for copy in self.copies if copy.tier), self.context.tier)


class Book:
    """All contexts that a process knows, by id; the deleted ones, too, until they had expired.

    Until when a context is kept is decided on the monotonic clock from the moment that it is taken
    in: a wall clock that is set meanwhile moves nothing.
    """

    def __init__(
        self,
        now_unix_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now_unix_s = now_unix_s
        self._monotonic_s = monotonic_s
        self._known: dict[str, tuple[Context, float]] = {}
        """With the monotonic time at which it ends."""
        self._ends: list[tuple[float, str]] = []
        """A heap of when they end, and when older versions of them would have."""
        self._chars = 0
        """Of all of them."""

    def take(self, context: Context) -> bool:
        """Whether it was new, or newer than what was known."""
        known = self._known.get(context.id)
        if known is not None and _age(known[0]) >= _age(context):
            return False
        left_s = context.expires_unix_s - self._now_unix_s()
        if left_s <= 0 and known is None:
            return False
        self._chars += size(context) - (0 if known is None else size(known[0]))
        end_s = self._monotonic_s() + left_s
        self._known[context.id] = (context, end_s)
        heapq.heappush(self._ends, (end_s, context.id))
        return True

    def check_room(self, context: Context) -> None:
        """Raises `Unavailable` where one more would be too much."""
        self.prune()
        if len(self._known) >= MOST or self._chars + size(context) > MOST_CHARS:
            raise Unavailable(
                f"{len(self._known)} contexts of {self._chars} characters are kept already, of at "
                f"most {MOST} and {MOST_CHARS}; delete some, or wait until some expire.",
                retry_after_s=60,
            )

    def get(self, id_: str) -> Context | None:
        """The newest version known, deleted or not, unless it has expired."""
        known = self._known.get(id_)
        return known[0] if known is not None and known[1] > self._monotonic_s() else None

    def find(self, id_: str, owner: Owner) -> Context | None:
        """One that the owner may use."""
        context = self.get(id_)
        usable = context is not None and not context.deleted and Owner.of(context) == owner
        return context if usable else None

    def live(self) -> list[Context]:
        """Neither deleted nor expired; newest first."""
        now_s = self._monotonic_s()
        living = [c for c, end_s in self._known.values() if end_s > now_s and not c.deleted]
        return sorted(living, key=lambda c: (-c.created_unix_s, c.id))

    def all(self) -> list[Context]:
        """Those that have been deleted, too."""
        now_s = self._monotonic_s()
        return [context for context, end_s in self._known.values() if end_s > now_s]

    def prune(self) -> list[Context]:
        """Forget what has expired; what that was."""
        now_s = self._monotonic_s()
        expired = []
        while self._ends and self._ends[0][0] <= now_s:
            _, id_ = heapq.heappop(self._ends)
            if id_ in self._known and self._known[id_][1] <= now_s:
                context, _ = self._known.pop(id_)
                self._chars -= size(context)
                expired.append(context)
        return expired


def _age(context: Context) -> tuple[float, int]:
    return context.created_unix_s, context.version


def size(context: Context) -> int:
    """Characters of its content."""
    return len(context.prompt) + sum(len(str(m.get("content", ""))) for m in context.messages)


def without_content(context: Context) -> Context:
    return msgspec.structs.replace(context, prompt="", messages=[])


def newer(context: Context, now_unix_s: float, **changes: Any) -> Context:
    """Its next version."""
    # Two gateways may change one at once: the later change is to win.
    version = max(context.version + 1, int(now_unix_s * 1000))
    return msgspec.structs.replace(context, version=version, updated_unix_s=now_unix_s, **changes)


def deleted(context: Context, now_unix_s: float) -> Context:
    return newer(without_content(context), now_unix_s, deleted=True)


@dataclass(frozen=True)
class Prefix:
    """What a context comes to with one model."""

    ids: list[int]
    text: str
    """As the chat template wrote its messages; empty for a prompt."""


class Prefixes:
    """Contexts -> token ids. Bounded: those used last are remembered."""

    def __init__(self) -> None:
        self._prefixes: OrderedDict[tuple[str, float, str], Prefix] = OrderedDict()
        self._tokens = 0

    async def of(self, context: Context, model: ServedModel) -> Prefix:
        """Raises `BadRequest` where the model's chat template refuses the messages."""
        key = (context.id, context.created_unix_s, model.tokenizer.bundle.digest)
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
            return self._prefixes[key]
        if context.messages:
            text = await asyncio.to_thread(_begun, context, model)
            ids = await encode(model.tokenizer, text, add_special_tokens=False)
        else:
            text, ids = "", await encode(model.tokenizer, context.prompt)
        if key not in self._prefixes:
            self._tokens += len(ids)
            self._prefixes[key] = Prefix(ids, text)
        while self._tokens > _PREPARED_TOKENS and len(self._prefixes) > 1:
            self._tokens -= len(self._prefixes.popitem(last=False)[1].ids)
        return Prefix(ids, text)


def _begun(context: Context, model: ServedModel) -> str:
    """The text of a conversation that begins with the context's messages, as far as they go."""
    begun = rendered(context, model, [], add_generation_prompt=False)
    # A template may look ahead: then no two conversations begin alike.
    if not rendered(context, model, [{"role": "user", "content": "?"}]).startswith(begun):
        raise BadRequest(
            f"The chat template of model '{context.model}' writes these messages otherwise when "
            "others follow, so they cannot be kept as a context; send them as a prompt.",
            param="messages",
        )
    return begun


def rendered(
    context: Context,
    model: ServedModel,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The context's messages and these as one conversation. Raises `BadRequest`."""
    if model.template is None:
        raise BadRequest(
            f"The model '{context.model}' has no chat template; send the context as a prompt.",
            param="messages",
        )
    # Templates may write today's date, and what is kept must not change with it.
    created = datetime.datetime.fromtimestamp(context.created_unix_s, datetime.UTC)
    try:
        return model.template.render(
            [*context.messages, *messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            now=created,
        )
    except ChatTemplateError as error:
        raise BadRequest(f"{error}.", param="messages") from error
