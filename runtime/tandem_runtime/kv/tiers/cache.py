"""All tiers of a pod: what a prompt can have of them, and what becomes of its pages.

Tiers work on threads of their own; the engine's thread only puts jobs into a queue and takes
results. `fetch` looks a prompt up and loads while it queues and while others compute; a page whose
load takes longer than computing it is not loaded. Nothing is awaited: whoever ends a stream early
says so by `leave`.

Two threads: one for the pod's own tiers, one for the remote one, which others share and which may
not answer. A prompt asks the remote tier for what the pod's own do not have, and for no longer than
computing that would take: then it goes on with what has come.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tandem_runtime.kv.layout import Payload
from tandem_runtime.kv.tiers.contract import Look, Page, Tier
from tandem_runtime.kv.tiers.jobs import Jobs
from tandem_runtime.kv.tiers.kept import Keep, Kept, KeptPages
from tandem_runtime.prefix import KEY_BYTES, keys_of, token_bytes

log = logging.getLogger(__name__)

_PROBE_PROMPTS: Final = 64
"""A tier that was too slow is tried again for one of so many prompts."""
_NEW_WEIGHT: Final = 0.2
"""Of the newest measurement of a tier's load time."""
_MOST_TENANTS: Final = 64
_BACKLOG_PAGES: Final = 16
"""Computed pages that may wait to be stored; further ones are not kept."""
_LOADED_PAGES: Final = 64
"""The same of loaded ones, which come all at once."""
_PAGES_AT_ONCE: Final = 4
"""That a tier is asked for. Then its speed is judged anew, and what has come can be taken."""


@dataclass
class Fetched:
    """What the tiers have for a prompt, and want of it."""

    arrival: int
    """Which prompt of the engine's it was."""
    block_keys: list[bytes] = field(default_factory=list)
    """Of the prompt's full blocks, as the accelerator's cache has them."""
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
    wanted_remotely: set[int] = field(default_factory=set)
    """Those of them that the remote tier is to be given, too."""

    def payloads_from(self, page: int) -> list[Payload]:
        """Of successive pages from this one on; none if it is not among them."""
        return self.payloads[page - self.first_page :] if page >= self.first_page else []


@dataclass
class _Lookup:
    """A prompt on its way through the tiers. One thread after the other has it, but `remote`, which
    the remote tier's fills, and `settled`, which it reads."""

    fetched: Fetched
    tokens: bytes
    page_tokens: int
    keep: Keep | None = None
    local: list[Payload] = field(default_factory=list)
    remote: list[Payload] = field(default_factory=list)
    """Of the pages that follow."""
    wanted_remotely: list[int] = field(default_factory=list)
    settled: bool = False
    """The prompt has gone on; what comes later comes too late."""

    @property
    def most_pages(self) -> int:
        """The last known token is always computed: its logits give the next one."""
        return (len(self.tokens) // 4 - 1) // self.page_tokens

    def next_page(self) -> int:
        """The first that is still to be loaded."""
        return self.fetched.first_page + len(self.local) + len(self.remote)

    def tokens_of(self, page: int) -> bytes:
        size = 4 * self.page_tokens
        return self.tokens[page * size : (page + 1) * size]

    def span(self, first: int, end: int) -> tuple[list[bytes], list[bytes]]:
        """Keys and tokens of some pages."""
        return self.fetched.keys[first:end], [self.tokens_of(page) for page in range(first, end)]

    def loaded(self, page: int) -> Page | None:
        """A page that was loaded before the prompt went on."""
        place, keys = page - self.fetched.first_page, self.fetched.keys
        if not 0 <= place < len(self.local):
            return None
        parent = keys[page - 1] if page else bytes(KEY_BYTES)
        return Page(keys[page], parent, self.tokens_of(page), self.local[place])


class _Backlog:
    """Pages that wait to be stored: one thread puts them, and one takes them."""

    def __init__(self, jobs: Jobs, most_pages: int) -> None:
        self._jobs = jobs
        self._most_pages = most_pages
        self._put = self._taken = 0
        self.woken: Callable[[], None] = lambda: None
        """Called from the thread that takes them once half of the room is free again."""

    @property
    def room_pages(self) -> int:
        """How many more `store` takes now."""
        return self._most_pages - (self._put - self._taken)

    def store(self, tiers: Sequence[Tier], page: Page) -> None:
        """Give a page to these tiers, or tell them that it will not come."""
        if self.room_pages <= 0:
            self.forget(tiers, [page.key])
            return
        self._put += 1
        self._jobs.put(partial(self._store, tiers, page))

    def forget(self, tiers: Sequence[Tier], keys: Sequence[bytes]) -> None:
        for tier in tiers if keys else ():
            self._jobs.put(partial(tier.forget, keys))

    def _store(self, tiers: Sequence[Tier], page: Page) -> None:
        self._taken += 1
        for tier in tiers:
            tier.store(page)
        if self.room_pages == self._most_pages // 2:
            self.woken()


class TierCache:
    """Args:
    tiers: the pod's own, fastest first; only their jobs use them from here on.
    jobs: where they run.
    page_tokens: of a page.
    compute_s: what a token costs to compute, in seconds; a tier has to be faster.
    remote: the tier that is shared, and where its jobs run.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        jobs: Jobs,
        *,
        page_tokens: int,
        compute_s: float,
        remote: tuple[Tier, Jobs] | None = None,
    ) -> None:
        self.tiers = (*tiers, *(remote[:1] if remote else ()))
        self.page_tokens = page_tokens
        self.wake: Callable[[], None] = lambda: None
        """Called from the jobs' thread when `poll` has something."""
        self.hit_tokens: dict[tuple[str, str], int] = {}
        """By tier and tenant, of admitted prompts. The engine's thread counts."""
        self._local = tuple(tiers)
        self._jobs = jobs
        self._remote = remote
        self.page_compute_s = compute_s * page_tokens
        """What a page costs to compute."""
        self._done: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self._load_s: dict[str, float] = {}
        """A page, by tier, as measured."""
        self._prompts = 0
        self._kept = KeptPages()
        # From the engine's thread and from the jobs' own: each has one writer.
        remote_jobs = remote[1] if remote else jobs
        self._computed = _Backlog(jobs, _BACKLOG_PAGES)
        self._computed_remotely = _Backlog(remote_jobs, _BACKLOG_PAGES)
        self._promoted = _Backlog(jobs, _LOADED_PAGES)
        self._passed_on = _Backlog(remote_jobs, _LOADED_PAGES)
        self._computed.woken = lambda: self.wake()  # who keeps a prompt may wait for room

    # -- from the engine's thread -----------------------------------------------------------------
    def fetch(
        self,
        arrival: int,
        tenant: str,
        root: bytes,
        token_ids: Sequence[int],
        look: Look,
        keep: Keep | None = None,
    ) -> None:
        """Look a prompt up and load what the accelerator does not hold of it; `poll` has it later.

        Args:
            arrival: the engine's number of the prompt; names the result.
            tenant: who asks.
            root: of the prompt's prefix keys.
            token_ids: the prompt; nobody changes the sequence meanwhile.
            look: what the accelerator holds need not be loaded; called from the jobs' thread.
            keep: pin the prompt's pages there; `kept` tells what came of it. One of the pod's own.
        """
        lookup = _Lookup(Fetched(arrival, tenant=tenant), b"", self.page_tokens, keep)
        self._jobs.put(partial(self._fetch, lookup, root, token_ids, look), urgent=True)

    def kept(self, name: str, told: Callable[[Kept | None], None]) -> None:
        """Tell, from the jobs' thread and after all jobs so far, what is kept under a name."""
        self._jobs.put(lambda: told(self._kept.look(name)))

    def drop(self, name: str) -> None:
        """Keep nothing under this name any more; pages stay as long as they are worth it."""
        # In order with `fetch`: what is kept under the name from then on is not meant.
        self._jobs.put(lambda: self._kept.drop(name), urgent=True)

    @property
    def room_pages(self) -> int:
        """How many more `offer` takes now."""
        return self._computed.room_pages

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
            full = label not in self.hit_tokens and len(self.hit_tokens) >= _MOST_TENANTS
            if full and not any(fetched.tenant in one.policy.named for one in self.tiers):
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
        self._computed.store(self._local, kept)
        if page in fetched.wanted_remotely and self._remote:
            self._computed_remotely.store(self._remote[:1], kept)

    def leave(self, fetched: Fetched) -> None:
        """The stream has ended; wanted pages that are not computed will not be."""
        keys = [fetched.keys[page] for page in fetched.wanted]
        fetched.wanted.clear()
        self._computed.forget(self._local, keys)
        if self._remote:
            self._computed_remotely.forget(self._remote[:1], keys)

    def close(self) -> None:
        """After what was offered is stored."""
        self._jobs.close()
        if self._remote:
            self._remote[1].close()
        for tier in self.tiers:
            tier.close()

    # -- the pod's own tiers' jobs ----------------------------------------------------------------
    def _fetch(self, lookup: _Lookup, root: bytes, token_ids: Sequence[int], look: Look) -> None:
        fetched, asks = lookup.fetched, False
        try:
            lookup.tokens = token_bytes(token_ids)
            fetched.block_keys, held_tokens = look(root, lookup.tokens)
            fetched.first_page = held_tokens // self.page_tokens
            fetched.keys = keys_of(root, lookup.tokens, self.page_tokens)
            self._prompts += 1
            while self._load_run(lookup):
                pass
            asks = self._ask_remote(lookup)
        except Exception:
            log.exception("the cache tiers failed; prompt %d is computed", fetched.arrival)
        if not asks:
            self._settle(lookup)

    def _load_run(self, lookup: _Lookup) -> bool:
        """Load successive pages from the fastest of the pod's tiers that has the next one."""
        first = lookup.next_page()
        for number, tier in enumerate(self._local):
            count = tier.lookup(lookup.fetched.keys[first : self._end(tier, lookup)])
            for faster in self._local[:number]:
                ahead = lookup.fetched.keys[first + 1 : first + count]
                places = (n for n, key in enumerate(ahead, 1) if faster.lookup([key]))
                count = min(count, next(places, count))
            found = self._load(tier, lookup, first, first + count)
            if found:
                lookup.local += found
                lookup.fetched.tiers += [tier.name] * len(found)
                return True
        return False

    def _end(self, tier: Tier, lookup: _Lookup) -> int:
        """Up to which page to ask a tier now: for one page while its speed is not known."""
        count = _PAGES_AT_ONCE if tier.name in self._load_s else 1
        return min(lookup.next_page() + count, lookup.most_pages)

    def _load(self, tier: Tier, lookup: _Lookup, first: int, end: int) -> list[Payload]:
        """Leading pages of [first, end), unless that takes longer than computing them."""
        known_s = self._load_s.get(tier.name, 0.0)
        if first >= end or (known_s > self.page_compute_s and self._prompts % _PROBE_PROMPTS):
            return []
        begun_s = time.perf_counter()
        found = tier.load(*lookup.span(first, end))
        if found:
            took_s = (time.perf_counter() - begun_s) / len(found)
            self._load_s[tier.name] = known_s + _NEW_WEIGHT * (took_s - known_s)
        return found

    def _ask_remote(self, lookup: _Lookup) -> bool:
        """Whether the remote tier is asked for the pages that the pod's own do not have."""
        missing = lookup.most_pages - lookup.next_page()
        if self._remote is None or missing < 1:
            return False
        tier, jobs = self._remote
        if not tier.lookup(lookup.fetched.keys[-1:]):
            return False
        jobs.put(partial(self._load_remote, lookup), urgent=True)
        self._jobs.later(missing * self.page_compute_s, partial(self._settle, lookup))
        return True

    def _settle(self, lookup: _Lookup) -> None:
        """All that will be loaded is; the prompt goes on, then pages go where they are wanted."""
        fetched = lookup.fetched
        if lookup.settled:
            keys = [fetched.keys[page] for page in lookup.wanted_remotely]
            if self._remote:
                self._passed_on.forget(self._remote[:1], keys)
            return
        lookup.settled = True
        if lookup.remote and self._remote:
            came, lookup.remote = lookup.remote[:], []
            lookup.local += came
            fetched.tiers += [self._remote[0].name] * len(came)
        fetched.payloads = lookup.local
        stores = []
        try:
            stores = self._wants(lookup)
        except Exception:
            log.exception("the cache tiers failed; prompt %d is not kept", fetched.arrival)
        self._done.put(fetched)
        self.wake()
        for backlog, tier, page in stores:
            backlog.store((tier,), page)

    def _wants(self, lookup: _Lookup) -> list[tuple[_Backlog, Tier, Page]]:
        """What tiers want of the pages that were loaded; what else they want, `fetched` says."""
        fetched, stores = lookup.fetched, []
        for tier in self._local:
            for page in self._kept.use(tier, fetched.tenant, fetched.keys, lookup.keep):
                if loaded := lookup.loaded(page):
                    stores.append((self._promoted, tier, loaded))
                else:
                    fetched.wanted.add(page)
        if self._remote is None:
            return stores
        wanted, lookup.wanted_remotely = lookup.wanted_remotely, []
        for page in wanted:
            if loaded := lookup.loaded(page):
                stores.append((self._passed_on, self._remote[0], loaded))
            else:
                fetched.wanted.add(page)
                fetched.wanted_remotely.add(page)
        return stores

    # -- the remote tier's jobs -------------------------------------------------------------------
    def _load_remote(self, lookup: _Lookup) -> None:
        assert self._remote is not None
        tier, fetched = self._remote[0], lookup.fetched
        try:
            found = True
            while found and not lookup.settled and lookup.next_page() < lookup.most_pages:
                first, end = lookup.next_page(), self._end(tier, lookup)
                came = self._load(tier, lookup, first, end)
                lookup.remote += came
                found = len(came) == end - first
            if not lookup.settled:
                lookup.wanted_remotely = tier.use(fetched.tenant, fetched.keys)
        except Exception:
            log.exception("the remote tier failed; prompt %d does without", fetched.arrival)
        self._jobs.put(partial(self._settle, lookup), urgent=True)
