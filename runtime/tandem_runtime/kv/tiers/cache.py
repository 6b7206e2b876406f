"""All tiers of a pod: what a prompt can have of them, and what becomes of its pages.

Tiers work on a thread of their own; the engine's thread only puts jobs into a queue and takes
results. `fetch` looks a prompt up and loads while it queues and while others compute; a page whose
load takes longer than computing it is not loaded. Nothing is awaited: whoever ends a stream early
says so by `leave`.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from tandem_runtime.kv.layout import Payload
from tandem_runtime.kv.tiers.contract import Keeper, Page, Tier
from tandem_runtime.kv.tiers.policy import NOWHERE
from tandem_runtime.prefix import KEY_BYTES, block_keys, token_bytes

log = logging.getLogger(__name__)

_PROBE_PROMPTS: Final = 64
"""A tier that was too slow is tried again for one of so many prompts."""
_NEW_WEIGHT: Final = 0.2
"""Of the newest measurement of a tier's load time."""
_MOST_TENANTS: Final = 64
_BACKLOG_PAGES: Final = 16
"""Pages that may wait to be stored; further ones are not kept."""

Job = Callable[[], None]


class Jobs(Protocol):
    """Runs jobs one at a time, in order, but urgent ones first."""

    def put(self, job: Job, *, urgent: bool = False) -> None: ...

    def close(self) -> None:
        """After the jobs that were put."""


class JobThread:
    """Implements `Jobs` on a thread."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="tiers", daemon=True)
        self._thread.start()

    def put(self, job: Job, *, urgent: bool = False) -> None:
        self._jobs.put((0 if urgent else 1, next(self._numbers), job))

    def close(self) -> None:
        self._jobs.put((2, next(self._numbers), None))
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            try:
                job()
            except Exception:
                log.exception("a job of the cache tiers failed")


@dataclass
class Fetched:
    """What the tiers have for a prompt, and want of it."""

    arrival: int
    """Which prompt of the engine's it was."""
    first_page: int = 0
    payloads: list[Payload] = field(default_factory=list)
    """Of successive pages from `first_page` on."""
    tiers: list[str] = field(default_factory=list)
    """Where each came from."""
    tenant: str = ""
    keys: list[bytes] = field(default_factory=list)
    """Of the prompt's full pages."""
    wanted: set[int] = field(default_factory=set)
    """Pages that a tier is to be given when they are computed."""

    def payloads_from(self, page: int) -> list[Payload]:
        """Of successive pages from this one on; none if it is not among them."""
        return self.payloads[page - self.first_page :] if page >= self.first_page else []


@dataclass(frozen=True)
class Keep:
    """That a prompt's full pages are to stay in a tier until `TierCache.drop`."""

    name: str
    """Whose they are; the same name again replaces what it kept before."""
    tier: str


@dataclass(frozen=True)
class Kept:
    """What a tier keeps under a name."""

    pages: int
    stored: int
    """Of them; the others are still to come, or were lost."""
    held_pages: int
    """That the tier is bound to keep, whoever's they are."""
    capacity_pages: int
    refused: bool = False
    """There was no room; nothing is kept."""


class TierCache:
    """Args:
    tiers: fastest first; only the jobs use them from here on.
    jobs: where they run.
    page_tokens: of a page.
    compute_s: what a token costs to compute, in seconds; a tier has to be faster.
    """

    def __init__(
        self, tiers: Sequence[Tier], jobs: Jobs, *, page_tokens: int, compute_s: float
    ) -> None:
        self.tiers = tuple(tiers)
        self.page_tokens = page_tokens
        self.wake: Callable[[], None] = lambda: None
        """Called from the jobs' thread when `poll` has something."""
        self.hit_tokens: dict[tuple[str, str], int] = {}
        """By tier and tenant: of prompts that were admitted. The engine's thread counts."""
        self._jobs = jobs
        self._page_compute_s = compute_s * page_tokens
        self._done: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self._load_s: dict[str, float] = {}
        """A page, by tier, as measured."""
        self._prompts = 0
        self._kept: dict[str, tuple[Tier, list[bytes]]] = {}
        """Pages that are pinned, by name; and the names that were refused, without any."""
        self._offered = self._taken = 0
        """Pages to be stored, and those of which the jobs have; each has one writer."""

    # -- from the engine's thread -----------------------------------------------------------------
    @property
    def page_compute_s(self) -> float:
        """What a page costs to compute."""
        return self._page_compute_s

    def fetch(
        self,
        arrival: int,
        tenant: str,
        root: bytes,
        token_ids: Sequence[int],
        held_tokens: int,
        keep: Keep | None = None,
    ) -> None:
        """Look a prompt up and load what the accelerator does not hold of it; `poll` has it later.

        Args:
            arrival: the engine's number of the prompt; names the result.
            tenant: who asks.
            root: of the prompt's prefix keys.
            token_ids: the prompt; nobody changes the sequence meanwhile.
            held_tokens: leading tokens that need not be loaded.
            keep: pin the prompt's pages there; `kept` tells what came of it.
        """
        self._jobs.put(
            lambda: self._fetch(arrival, tenant, root, token_ids, held_tokens, keep), urgent=True
        )

    def kept(self, name: str, told: Callable[[Kept | None], None]) -> None:
        """Tell, from the jobs' thread and after all jobs so far, what is kept under a name."""
        self._jobs.put(lambda: told(self._look(name)))

    def drop(self, name: str) -> None:
        """Keep nothing under this name any more; pages stay as long as they are worth it."""
        # In order with `fetch`: what is kept under the name from then on is not meant.
        self._jobs.put(lambda: self._unpin(name), urgent=True)

    @property
    def room_pages(self) -> int:
        """How many more `offer` takes now."""
        return _BACKLOG_PAGES - (self._offered - self._taken)

    @property
    def ready(self) -> bool:
        """Whether `poll` has something."""
        return not self._done.empty()

    def poll(self) -> list[Fetched]:
        """Results since the last call."""
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found

    def count(self, fetched: Fetched, first_page: int) -> None:
        """The prompt's pages from this one on were taken."""
        for tier in fetched.tiers[first_page - fetched.first_page :]:
            label = (tier, fetched.tenant)
            if label not in self.hit_tokens and len(self.hit_tokens) >= _MOST_TENANTS:
                label = (tier, "other")
            self.hit_tokens[label] = self.hit_tokens.get(label, 0) + self.page_tokens

    def offer(
        self, fetched: Fetched, page: int, token_ids: Sequence[int], payload: Payload
    ) -> None:
        """A wanted page is computed."""
        fetched.wanted.discard(page)
        start = page * self.page_tokens
        tokens = token_bytes(token_ids[start : start + self.page_tokens])
        parent = fetched.keys[page - 1] if page else bytes(KEY_BYTES)
        kept = Page(fetched.keys[page], parent, tokens, payload)
        if self.room_pages <= 0:
            self._jobs.put(lambda: self._forget([kept.key]))
            return
        self._offered += 1
        self._jobs.put(lambda: self._store(kept))

    def leave(self, fetched: Fetched) -> None:
        """The stream has ended; wanted pages that are not computed will not be."""
        keys = [fetched.keys[page] for page in fetched.wanted]
        fetched.wanted.clear()
        if keys:
            self._jobs.put(lambda: self._forget(keys))

    def close(self) -> None:
        """After what was offered is stored."""
        self._jobs.close()
        for tier in self.tiers:
            tier.close()

    # -- jobs -------------------------------------------------------------------------------------
    def _fetch(
        self,
        arrival: int,
        tenant: str,
        root: bytes,
        token_ids: Sequence[int],
        held_tokens: int,
        keep: Keep | None,
    ) -> None:
        fetched = Fetched(arrival, held_tokens // self.page_tokens, tenant=tenant)
        try:
            fetched.keys = block_keys(root, token_ids, self.page_tokens)
            self._load(fetched, token_ids, keep)
        except Exception:
            log.exception("the cache tiers failed; prompt %d is computed", arrival)
        self._done.put(fetched)
        self.wake()

    def _load(self, fetched: Fetched, token_ids: Sequence[int], keep: Keep | None) -> None:
        self._prompts += 1
        # The last known token is always computed: its logits give the next one.
        most = (len(token_ids) - 1) // self.page_tokens
        for page in range(fetched.first_page, most):
            start = page * self.page_tokens
            tokens = token_bytes(token_ids[start : start + self.page_tokens])
            for tier in self.tiers:
                payload = self._load_page(tier, fetched.keys[page], tokens)
                if payload is not None:
                    fetched.payloads.append(payload)
                    fetched.tiers.append(tier.name)
                    break
            else:
                break
        for tier in self.tiers:
            for page in self._wanted(tier, fetched, keep):
                here = page - fetched.first_page
                if 0 <= here < len(fetched.payloads):
                    start = page * self.page_tokens
                    tokens = token_bytes(token_ids[start : start + self.page_tokens])
                    parent = fetched.keys[page - 1] if page else bytes(KEY_BYTES)
                    tier.store(Page(fetched.keys[page], parent, tokens, fetched.payloads[here]))
                else:
                    fetched.wanted.add(page)

    def _load_page(self, tier: Tier, key: bytes, tokens: bytes) -> Payload | None:
        known_s = self._load_s.get(tier.name, 0.0)
        if known_s > self._page_compute_s and self._prompts % _PROBE_PROMPTS:
            return None
        begun_s = time.perf_counter()
        payload = tier.load(key, tokens)
        if payload is not None:
            took_s = time.perf_counter() - begun_s
            self._load_s[tier.name] = known_s + _NEW_WEIGHT * (took_s - known_s)
        return payload

    def _wanted(self, tier: Tier, fetched: Fetched, keep: Keep | None) -> list[int]:
        if keep is None or keep.tier != tier.name or not isinstance(tier, Keeper):
            return tier.use(fetched.tenant, fetched.keys)
        self._unpin(keep.name)
        wanted = tier.keep(fetched.tenant, fetched.keys)
        self._kept[keep.name] = (tier, [] if wanted is None else fetched.keys)
        return tier.use(fetched.tenant, fetched.keys) if wanted is None else wanted

    def _unpin(self, name: str) -> None:
        if name in self._kept:
            tier, keys = self._kept.pop(name)
            tier.policy.unpin(keys)

    def _look(self, name: str) -> Kept | None:
        if name not in self._kept:
            return None
        tier, keys = self._kept[name]
        policy = tier.policy
        stored = sum(policy.place(key) != NOWHERE for key in keys)
        counts = policy.pinned_pages, policy.capacity_pages
        return Kept(len(keys), stored, *counts, refused=not keys)

    def _store(self, page: Page) -> None:
        self._taken += 1
        for tier in self.tiers:
            tier.store(page)
        if self.room_pages == _BACKLOG_PAGES // 2:
            self.wake()  # somebody may wait for room

    def _forget(self, keys: Sequence[bytes]) -> None:
        for tier in self.tiers:
            tier.forget(keys)
