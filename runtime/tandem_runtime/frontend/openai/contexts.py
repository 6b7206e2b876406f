"""/v1/contexts: a long prefix that is computed once and kept under a name for a while.

OpenAI has no such endpoint. What a context is follows Gemini's cachedContents (immutable content, a
time to live that alone can be changed, its tokens in the answer); how objects and pages of them
look follows OpenAI.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from tandem_runtime import contract
from tandem_runtime.frontend.backend import Backend, ServedModel
from tandem_runtime.frontend.contexts import ContextView, Owner, Prefixes, deleted, newer
from tandem_runtime.frontend.errors import BadRequest, ContextTooLong
from tandem_runtime.frontend.generation import tenant_of
from tandem_runtime.frontend.openai.request import ChatMessage
from tandem_runtime.frontend.parameters import Salt, Text
from tandem_runtime.protocol import Context

MIN_TOKENS: Final = contract.KV_PAGE_TOKENS
"""A page: tiers keep nothing less."""
_DEFAULT_TTL_S: Final = 3600
_MOST_TTL_S: Final = 366 * 86_400
Ttl = Annotated[int, Field(ge=1, le=_MOST_TTL_S)]
UnixSeconds = Annotated[int, Field(ge=1, le=2**40)]


class ContextRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[str, Field(max_length=512)]
    prompt: Text | None = Field(None, description="The content as text, or:")
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = Field(
        None, description="as the beginning of a conversation."
    )
    ttl_seconds: Ttl | None = Field(None, description="From now; an hour by default.")
    expires_at: UnixSeconds | None = Field(None, description="Instead of ttl_seconds.")
    display_name: Annotated[str, Field(max_length=128)] | None = None
    tier: Annotated[str, Field(max_length=63)] | None = Field(
        None,
        description="accelerator, or the name of a cache tier: memory or disk. By default each "
        "pod's first tier below the accelerator.",
    )
    copies: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="How many pods keep it; 1 by default."
    )
    cache_salt: Salt | None = Field(
        None, description="Only requests of the same salt may use the context."
    )


class ContextUpdate(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    ttl_seconds: Ttl | None = Field(None, description="From now.")
    expires_at: UnixSeconds | None = None
    cache_salt: Salt | None = None


Id = Annotated[str, Field(max_length=128)]
SaltOf = Annotated[str, Query(max_length=256, description="The context's, if it has one.")]


def router(backend: Backend, prefixes: Prefixes) -> APIRouter:
    """Routes below /v1/contexts."""
    routes = APIRouter(prefix="/v1/contexts", tags=["Contexts"])

    @routes.post("")
    async def create(body: ContextRequest, request: Request) -> dict[str, Any]:
        context = await _new(backend, prefixes, body, _tenant(request))
        return _shown(await backend.contexts.create(context))

    @routes.get("")
    async def list_contexts(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str, Query(max_length=128)] = "",
        cache_salt: SaltOf = "",
    ) -> dict[str, Any]:
        owned = await backend.contexts.owned(Owner(_tenant(request), cache_salt))
        ids = [view.context.id for view in owned]
        first = ids.index(after) + 1 if after in ids else 0
        page = owned[first : first + limit]
        return {
            "object": "list",
            "data": [_shown(view) for view in page],
            "first_id": page[0].context.id if page else None,
            "last_id": page[-1].context.id if page else None,
            "has_more": first + limit < len(owned),
        }

    @routes.get("/{id}")
    async def get(id: Id, request: Request, cache_salt: SaltOf = "") -> dict[str, Any]:
        return _shown(await backend.contexts.find(id, Owner(_tenant(request), cache_salt)))

    @routes.patch("/{id}")
    async def change(id: Id, body: ContextUpdate, request: Request) -> dict[str, Any]:
        expires_unix_s = _expiry(body, time.time())
        if expires_unix_s is None:
            raise BadRequest(
                "Only the time to live can be changed: send ttl_seconds or expires_at.",
                param="ttl_seconds",
            )
        owner = Owner(_tenant(request), body.cache_salt or "")
        found = await backend.contexts.find(id, owner)
        context = newer(found.context, time.time(), expires_unix_s=expires_unix_s)
        return _shown(await backend.contexts.change(context))

    @routes.delete("/{id}")
    async def delete(id: Id, request: Request, cache_salt: SaltOf = "") -> dict[str, Any]:
        found = await backend.contexts.find(id, Owner(_tenant(request), cache_salt))
        await backend.contexts.change(deleted(found.context, time.time()))
        return {"id": id, "object": "context.deleted", "deleted": True}

    return routes


def _tenant(request: Request) -> str:
    return tenant_of(request.headers.get(contract.HEADER_TENANT))


def _expiry(body: ContextRequest | ContextUpdate, now_unix_s: float) -> float | None:
    """None: the request says nothing of it. Raises `BadRequest`."""
    if body.ttl_seconds is not None and body.expires_at is not None:
        raise BadRequest("Send ttl_seconds or expires_at, not both.", param="expires_at")
    if body.ttl_seconds is not None:
        return now_unix_s + body.ttl_seconds
    if body.expires_at is None:
        return None
    left_s = body.expires_at - now_unix_s
    if not 0 < left_s <= _MOST_TTL_S:
        raise BadRequest(
            f"expires_at is {left_s:.0f} s from now; give a time of the next {_MOST_TTL_S} s. To "
            "end a context now, delete it.",
            param="expires_at",
        )
    return float(body.expires_at)


async def _new(backend: Backend, prefixes: Prefixes, body: ContextRequest, tenant: str) -> Context:
    """Raises `BadRequest` for what can never be kept."""
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("Send prompt or messages: one of them.", param="prompt")
    for n, message in enumerate(body.messages or []):
        message.check(f"messages.{n}")
    now_unix_s = time.time()
    expires_unix_s = _expiry(body, now_unix_s) or now_unix_s + _DEFAULT_TTL_S
    model = await backend.resolve(body.model)
    messages = [m.for_template(f"messages.{n}") for n, m in enumerate(body.messages or [])]
    context = Context(
        id=f"ctx-{secrets.token_hex(16)}",
        model=body.model,
        fleet=model.card.fleet,
        tenant=tenant,
        created_unix_s=now_unix_s,
        expires_unix_s=expires_unix_s,
        cache_salt=body.cache_salt or "",
        prompt=body.prompt or "",
        messages=messages,
        display_name=body.display_name or "",
        tier=body.tier or "",
        copies=body.copies or 1,
    )
    param = "prompt" if body.messages is None else "messages"
    return await sized(context, prefixes, model, param)


async def sized(
    context: Context, prefixes: Prefixes, model: ServedModel, param: str = "prompt"
) -> Context:
    """The context with its number of tokens. Raises `BadRequest` where that is none to be kept."""
    tokens = len((await prefixes.of(context, model)).ids)
    if tokens < MIN_TOKENS:
        raise BadRequest(
            f"The context has {tokens} tokens; at least {MIN_TOKENS} are kept under a name. Send "
            "it with each request: the prefix cache finds it.",
            param=param,
        )
    if tokens >= model.context_tokens:
        raise ContextTooLong(
            f"The context has {tokens} tokens; the model is served with {model.context_tokens}, "
            f"for context, prompt and answer together. Shorten it by at least "
            f"{tokens - model.context_tokens + 1} tokens.",
            param=param,
        )
    return msgspec.structs.replace(context, tokens=tokens)


def _shown(view: ContextView) -> dict[str, Any]:
    context = view.context
    updated_unix_s = context.updated_unix_s or context.created_unix_s
    return {
        "id": context.id,
        "object": "context",
        "model": context.model,
        "display_name": context.display_name or None,
        "created_at": int(context.created_unix_s),
        "updated_at": int(updated_unix_s),
        "expires_at": int(context.expires_unix_s),
        "status": view.status,
        "status_reason": view.reason or None,
        "tier": view.tier or None,
        "copies": {
            "wanted": context.copies,
            "ready": sum(copy.state == "ready" for copy in view.copies),
        },
        "usage": {"total_tokens": view.tokens},
    }
