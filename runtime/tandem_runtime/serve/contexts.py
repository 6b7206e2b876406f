"""The named contexts of a pod: kept for as long as they are to be, whatever happens meanwhile.

One task settles one context after the other: what is known of it (the book) against what is done
(the copies). It is woken by changes, and looks at everything from time to time: contexts expire,
and pages that a tier lost are computed again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tandem_runtime.engine.sequence import NotFinite, RequestRefused
from tandem_runtime.frontend.backend import ServedModel
from tandem_runtime.frontend.contexts import Book, ContextView, Owner, Prefixes
from tandem_runtime.frontend.errors import ApiError, BadRequest, ContextNotFound
from tandem_runtime.protocol import Context, ContextCopy
from tandem_runtime.serve.context_files import ContextFiles
from tandem_runtime.serve.keeper import KvKeeper, NotKept, Pinned

log = logging.getLogger(__name__)

TICK_S: Final = 1.0
"""How late an expired context ends."""
CHECK_S: Final = 30.0
"""How often it is looked whether everything is still there, and what failed is tried again."""
_LAST_UNIX_S: Final = 2.0**36
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass
class _Copy:
    context: Context
    """The version that was settled."""
    pinned: Pinned | None = None
    reason: str = ""
    looked_s: float = 0.0
    metered_s: float = 0.0
    byte_seconds: float = 0.0

    def meter(self, now_s: float) -> None:
        if self.pinned is not None:
            self.byte_seconds += self.pinned.kept_bytes * (now_s - self.metered_s)
        self.metered_s = now_s


class PodContexts:
    """Implements `frontend.backend.Contexts` with what this pod keeps itself."""

    def __init__(
        self,
        keeper: KvKeeper,
        model: ServedModel,
        files: ContextFiles | None = None,
        book: Book | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper = keeper
        self._model = model
        self._files = files
        self._book = book or Book()
        self._monotonic_s = monotonic_s
        self._prefixes = Prefixes()
        self._copies: dict[str, _Copy] = {}
        self.ended_byte_seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        """By tier and tenant: what contexts that have ended cost."""
        self._changed = asyncio.Event()
        self._unsettled: dict[str, None] = {}
        """Ids, in the order in which they changed."""
        self._settling: tuple[str, asyncio.Task[None]] | None = None

    async def load(self) -> None:
        """What a pod before this one kept. Before anybody asks, who would be told of none."""
        if self._files is None:
            return
        for context in await asyncio.to_thread(self._files.load):
            if context.fleet == self._model.card.fleet and self._book.take(context):
                self._unsettled[context.id] = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._look_around()
            while self._unsettled:
                id_ = next(iter(self._unsettled))
                del self._unsettled[id_]
                await self._settle_one(id_)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), TICK_S)
            except TimeoutError:
                continue

    # -- from the pod's endpoints ---------------------------------------------------------------
    def put(self, context: Context) -> ContextCopy:
        """Keep it, or this version of it. Raises `BadRequest` where this pod cannot."""
        if not _ID.fullmatch(context.id):
            raise BadRequest(f"'{context.id}' is no id of a context.", param="id")
        for time_s in (context.created_unix_s, context.expires_unix_s):
            if not 0 <= time_s <= _LAST_UNIX_S:
                raise BadRequest(f"{time_s} is no time: seconds since 1970 are meant.")
        if context.tier and context.tier not in self._keeper.tiers:
            raise BadRequest(
                f"The tier '{context.tier}' is none that keeps contexts here; write one of "
                f"{', '.join(self._keeper.tiers)}, or leave it out.",
                param="tier",
            )
        if self._book.get(context.id) is None and not context.deleted:
            self._book.check_room(context)
        if self._book.take(context):
            self._unsettled[context.id] = None
            self._changed.set()
            if context.deleted and self._settling is not None and self._settling[0] == context.id:
                self._settling[1].cancel()
        return self._shown(context.id)

    def get(self, id_: str) -> Context:
        """With its content. Raises `ContextNotFound`."""
        context = self._book.get(id_)
        if context is None:
            raise ContextNotFound(id_)
        return context

    @property
    def copies(self) -> tuple[ContextCopy, ...]:
        """Of all contexts that have not expired; the deleted ones, too."""
        return tuple(self._shown(context.id) for context in self._book.all())

    def metered(self) -> list[tuple[Context, ContextCopy]]:
        """Those that are kept, or to be."""
        return [(context, self._shown(context.id)) for context in self._book.live()]

    # -- frontend.backend.Contexts ----------------------------------------------------------------
    async def create(self, context: Context) -> ContextView:
        return ContextView(context, (self.put(context),))

    async def find(self, id_: str, owner: Owner) -> ContextView:
        context = self._book.find(id_, owner)
        if context is None:
            raise ContextNotFound(id_)
        return ContextView(context, (self._shown(id_),))

    async def owned(self, owner: Owner) -> list[ContextView]:
        mine = [context for context in self._book.live() if Owner.of(context) == owner]
        return [ContextView(context, (self._shown(context.id),)) for context in mine]

    async def change(self, context: Context) -> ContextView:
        return ContextView(context, (self.put(context),))

    # -- settling ---------------------------------------------------------------------------------
    def _look_around(self) -> None:
        now_s = self._monotonic_s()
        for context in self._book.prune():
            self._unsettled[context.id] = None
        for id_, copy in self._copies.items():
            if now_s - copy.looked_s >= CHECK_S:
                self._unsettled[id_] = None

    async def _settle_one(self, id_: str) -> None:
        """As a task of its own, which a deletion ends."""
        task = asyncio.ensure_future(self._settle(id_))
        self._settling = (id_, task)
        try:
            await asyncio.wait({task})
            if not task.cancelled() and (failure := task.exception()) is not None:
                log.error("the context %s cannot be settled", id_, exc_info=failure)
        finally:
            self._settling = None
            task.cancel()

    async def _settle(self, id_: str) -> None:
        context = self._book.get(id_)
        copy = self._copies.get(id_)
        if copy is not None and (
            context is None
            or context.deleted
            or copy.context.created_unix_s < context.created_unix_s
        ):
            self._end(copy)
            copy = None
        if context is None:
            if self._files is not None:
                await asyncio.to_thread(self._files.remove, id_)
            return
        if self._files is not None and (copy is None or copy.context is not context):
            await asyncio.to_thread(self._files.save, context)
        if context.deleted:
            self._keeper.drop(id_, None)
            return
        if copy is None:
            copy = self._copies[id_] = _Copy(context)
        copy.context = context
        await self._keep(copy)

    async def _keep(self, copy: _Copy) -> None:
        context = copy.context
        try:
            if copy.pinned is not None and await self._keeper.intact(context, copy.pinned):
                return
            if copy.pinned is not None:
                log.warning(
                    "the context %s is not whole any more: it is computed again", context.id
                )
                self._let_go(copy)
            prefix = await self._prefixes.of(context, self._model)
            pinned = await self._keeper.keep(context, prefix.ids)
            copy.meter(self._monotonic_s())
            copy.pinned, copy.reason = pinned, ""
        except (NotKept, RequestRefused, NotFinite, ApiError) as error:
            told = str(error).rstrip(".")
            copy.reason = f"{told[0].upper()}{told[1:]}."
            log.warning("the context %s is not kept: %s", context.id, told)
        finally:
            copy.looked_s = self._monotonic_s()

    def _end(self, copy: _Copy) -> None:
        tier = self._shown_tier(copy.context, copy)
        self._let_go(copy)
        self.ended_byte_seconds[tier, copy.context.tenant] += copy.byte_seconds
        del self._copies[copy.context.id]

    def _let_go(self, copy: _Copy) -> None:
        copy.meter(self._monotonic_s())
        self._keeper.drop(copy.context.id, copy.pinned)
        copy.pinned = None

    def _shown(self, id_: str) -> ContextCopy:
        context = self._book.get(id_)
        if context is None:
            return ContextCopy(id_, 0.0, 0)
        copy = self._copies.get(id_)
        told = ContextCopy(id_, context.created_unix_s, context.version, tier=context.tier)
        if copy is None:
            return told
        copy.meter(self._monotonic_s())
        pinned = copy.pinned
        return ContextCopy(
            id_,
            context.created_unix_s,
            context.version,
            state="ready" if pinned else "failed" if copy.reason else "building",
            reason="" if pinned else copy.reason,
            tokens=pinned.tokens if pinned else context.tokens,
            bytes=pinned.kept_bytes if pinned else 0,
            tier=self._shown_tier(context, copy),
            token_compute_s=pinned.token_compute_s if pinned else 0.0,
            byte_seconds=copy.byte_seconds,
        )

    def _shown_tier(self, context: Context, copy: _Copy) -> str:
        return copy.pinned.tier if copy.pinned else context.tier or self._keeper.tiers[0]
