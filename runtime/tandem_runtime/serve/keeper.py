"""How a pod keeps one context: its prompt is computed once, and its KV pinned in a tier."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import NotFinite, Request, StreamOutput
from tandem_runtime.kv.tiers.contract import Keeper as KeepingTier
from tandem_runtime.kv.tiers.kept import Keep, Kept
from tandem_runtime.prefix import compact
from tandem_runtime.protocol import Context, Named, Sampling
from tandem_runtime.serve.worker import EngineFailed, EngineWorker

ACCELERATOR: Final = "accelerator"


class NotKept(Exception):
    """The context's KV is not kept now; the message says why. It may be later."""


@dataclass
class Pinned:
    """KV that is kept."""

    tier: str
    tokens: int
    """Of the context."""
    kept_bytes: int
    """Of it: whole pages, or blocks."""
    token_compute_s: float
    keys: list[bytes] = field(default_factory=list)
    """Of its blocks on the accelerator."""


class KvKeeper:
    """Over the engine's thread; `engine`'s constants are read from any."""

    def __init__(self, worker: EngineWorker, engine: Engine) -> None:
        self._worker = worker
        self._token_bytes = engine.layout.token_bytes
        self._tiers = engine.tiers
        below = [] if engine.tiers is None else engine.tiers.tiers
        self.tiers = (*(t.name for t in below if isinstance(t, KeepingTier)), ACCELERATOR)
        """Where a context can be kept; the default first."""

    async def keep(self, context: Context, ids: list[int]) -> Pinned:
        """Compute what no tier has of it, and pin it. Raises `NotKept`, `RequestRefused`,
        `NotFinite` or `EngineFailed`."""
        if len(ids) < KV_PAGE_TOKENS:
            raise NotKept(f"the context has {len(ids)} tokens; at least {KV_PAGE_TOKENS} are kept")
        tier = context.tier or self.tiers[0]
        name = f"context/{context.id}"
        on_accelerator = tier == ACCELERATOR
        request = Request(
            name,
            compact(ids),
            Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
            tenant=context.tenant,
            cache_salt=context.cache_salt,
            export=True,
            keep=None if on_accelerator else Keep(context.id, tier),
            begins=Named(context.id, context.created_unix_s, len(ids)),
        )
        try:
            token_compute_s = await self._compute(request)
            if on_accelerator:
                keys = await self._worker.call(lambda engine: engine.keeping.pin(name))
                held_tokens = await self._pinned_tokens(keys)
                return Pinned(
                    tier, len(ids), held_tokens * self._token_bytes, token_compute_s, keys
                )
            await self._worker.until(lambda engine: engine.keeping.offered(name))
        finally:
            self._worker.unroute(name)
            self._worker.call(lambda engine: engine.abort(name))
        kept = await self._look(context.id)
        _check(kept, tier, len(ids))
        held_bytes = kept.pages * KV_PAGE_TOKENS * self._token_bytes if kept is not None else 0
        return Pinned(tier, len(ids), held_bytes, token_compute_s)

    async def intact(self, context: Context, pinned: Pinned) -> bool:
        """Whether all of it is still there."""
        if pinned.tier == ACCELERATOR:
            held_tokens = await self._pinned_tokens(pinned.keys)
            return held_tokens * self._token_bytes == pinned.kept_bytes
        kept = await self._look(context.id)
        return kept is not None and kept.stored == kept.pages > 0

    def drop(self, context_id: str, pinned: Pinned | None) -> None:
        """It need not be kept any more."""
        if self._tiers is not None:
            self._tiers.drop(context_id)
        if pinned is not None and pinned.keys:
            self._worker.call(lambda engine: engine.keeping.unpin(pinned.keys))

    async def _compute(self, request: Request) -> float:
        """Until the stream is held; what a token of it took, or is known to take."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[StreamOutput] = loop.create_future()
        first_s = 0.0

        def receive(output: StreamOutput, began_s: float) -> None:
            nonlocal first_s
            first_s = first_s or began_s
            if done.done():
                return
            if output.token is not None:
                done.set_result(output)
            elif output.finish_reason is not None:
                done.set_exception(NotFinite())

        self._worker.route(request.request_id, receive)
        await self._worker.call(lambda engine: engine.add(request))
        either: set[asyncio.Future[Any]] = {done, self._worker.failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise EngineFailed("the engine has failed")
        output = done.result()
        if self._tiers is not None:
            return self._tiers.page_compute_s / KV_PAGE_TOKENS
        computed = len(request.prompt_ids) - output.cached_tokens
        return (self._worker.now_s - first_s) / max(computed, 1)

    async def _pinned_tokens(self, keys: list[bytes]) -> int:
        return await self._worker.call(lambda engine: engine.keeping.pinned_tokens(keys))

    async def _look(self, name: str) -> Kept | None:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Kept | None] = loop.create_future()

        def settle(kept: Kept | None) -> None:
            if not told.done():
                told.set_result(kept)

        def tell(kept: Kept | None) -> None:
            loop.call_soon_threadsafe(settle, kept)

        assert self._tiers is not None
        self._tiers.kept(name, tell)
        return await told


def _check(kept: Kept | None, tier: str, tokens: int) -> None:
    """Raises `NotKept`."""
    pages = tokens // KV_PAGE_TOKENS
    if kept is None:
        raise NotKept("the cache tiers failed; the pod's log has the details")
    if kept.refused:
        raise NotKept(
            f"tier {tier} has no room to keep {pages} pages: it keeps {kept.held_pages} of its "
            f"{kept.capacity_pages} already; delete other contexts, or make the tier (or the "
            "tenant's part of it) larger"
        )
    if kept.stored < kept.pages:
        missing = kept.pages - kept.stored
        raise NotKept(f"{missing} of {kept.pages} pages could not be stored in tier {tier}")
