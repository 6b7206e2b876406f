"""Pages that streams fill without computing them as a prompt here: received from a prefill pod, or
made by decode steps. They are kept as they fill.

The engine's thread says which, and copies nothing: the tiers' thread reads the blocks beside it
(engine/lending.py), a page a job, so that prompts' look-ups go first. A page that has left the
accelerator by then is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tandem_runtime.kv.tiers.backlog import Backlog
from tandem_runtime.kv.tiers.contract import Lent, Page, Tier
from tandem_runtime.kv.tiers.jobs import Jobs
from tandem_runtime.prefix import KEY_BYTES, continue_keys, token_bytes

MOST_FILLS: Final = 1024
"""Calls of `fill` that may wait."""
MOST_PAGES: Final = 4096
"""Pages that may wait to be read: a prompt of 1,000,000 tokens has fewer."""
_REMOTE_PAGES: Final = 16
"""Pages in memory that wait for the remote tier."""


@dataclass
class Followed:
    """A stream whose pages are kept as they fill."""

    tenant: str
    root: bytes
    """Of its keys."""
    asked_tokens: int
    """It began with so many; the others were generated here."""
    keys: list[bytes] = field(default_factory=list)
    """Of its pages so far. The tiers' thread has them."""
    pages: int = 0
    """Of which the tiers were told. The engine's thread counts."""
    lost: bool = False
    """A page was passed over: later ones are of no use without it."""


@dataclass(frozen=True)
class _Wanted:
    """A page that is to be read."""

    key: bytes
    parent: bytes
    tokens: bytes
    block_keys: list[bytes]
    takers: list[Tier]
    """Those of the pod's own that want it."""
    remotely: bool
    """Whether the remote tier is to be asked if it does."""


class Following:
    """Args:
    jobs: where the pod's own tiers' jobs run.
    tiers: the pod's own.
    remote: the tier that is shared, and where its jobs run.
    page_tokens: of a page.
    """

    def __init__(
        self,
        jobs: Jobs,
        tiers: Sequence[Tier],
        remote: tuple[Tier, Jobs] | None,
        page_tokens: int,
    ) -> None:
        self.read: Callable[[Sequence[bytes], bytes], Lent | None] | None = None
        """Of a page's block keys and token ids, from the tiers' thread: what the accelerator has.
        None: nothing can be read beside steps, and no stream is followed."""
        self._tiers = tuple(tiers)
        self._remote = remote
        self._page_tokens = page_tokens
        self._fills = Backlog(jobs, MOST_FILLS)
        self._reads = Backlog(jobs, MOST_PAGES)
        self._sends = None if remote is None else Backlog(remote[1], _REMOTE_PAGES)

    def fill(self, stream: Followed, token_ids: Sequence[int], block_keys: list[bytes]) -> None:
        """Whole pages of a stream are computed, which follow those so far.

        Args:
            token_ids: of these pages; nobody changes the sequence afterwards.
            block_keys: of their blocks on the accelerator.
        """
        stream.pages += len(token_ids) // self._page_tokens
        stream.lost = not self._fills.put(partial(self._fill, stream, token_ids, block_keys))

    # -- the tiers' thread ------------------------------------------------------------------------
    def _fill(self, stream: Followed, token_ids: Sequence[int], block_keys: list[bytes]) -> None:
        tokens, first = token_bytes(token_ids), len(stream.keys)
        parent = stream.keys[-1] if first else bytes(KEY_BYTES)
        continue_keys(stream.keys, stream.root, tokens, self._page_tokens)
        keys = stream.keys[first:]
        takers: list[list[Tier]] = [[] for _ in keys]
        for tier in self._tiers:
            for place in tier.use(stream.tenant, keys, goes_on=first > 0):
                takers[place].append(tier)
        size, blocks = 4 * self._page_tokens, len(block_keys) // len(keys)
        for n, (key, before) in enumerate(zip(keys, [parent, *keys], strict=False)):
            ids, held = tokens[n * size : (n + 1) * size], block_keys[n * blocks : (n + 1) * blocks]
            # What it began with is the prefill pod's to send to the remote tier.
            generated = (first + n + 1) * self._page_tokens > stream.asked_tokens
            remotely = generated and self._remote is not None
            page = _Wanted(key, before, ids, held, takers[n], remotely)
            if (page.takers or remotely) and not self._reads.put(
                partial(self._keep, stream.tenant, page)
            ):
                _forget(page)

    def _keep(self, tenant: str, wanted: _Wanted) -> None:
        lent = self.read(wanted.block_keys, wanted.tokens) if self.read else None
        if lent is None:
            _forget(wanted)
            return
        page = Page(wanted.key, wanted.parent, wanted.tokens, lent.payload, lent.decoded)
        for tier in wanted.takers:
            tier.store(page)
        if self._sends is not None and wanted.remotely:
            self._sends.put(partial(self._send, tenant, page))

    # -- the remote tier's thread -----------------------------------------------------------------
    def _send(self, tenant: str, page: Page) -> None:
        assert self._remote is not None
        tier = self._remote[0]
        if tier.use(tenant, [page.key], goes_on=True):
            tier.store(page)


def _forget(wanted: _Wanted) -> None:
    for tier in wanted.takers:
        tier.forget([wanted.key])
