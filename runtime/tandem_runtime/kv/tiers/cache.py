"""All tiers of a pod: what a prompt can have of them, and what becomes of its pages.

Tiers work on threads of their own; the engine's thread only puts jobs into a queue and takes
results. `fetch` looks a prompt up and loads while it queues and while others compute; a page whose
load takes longer than computing it is not loaded. Nothing is awaited: whoever ends a stream early
says so by `leave`.

Three threads: one for the pod's own tiers, one each for peers and for the remote tier, which may
not answer. For what the pod's own do not have, a prompt asks the peer that was named with it, then
the remote tier, and both for no longer than computing would take: then it goes on with what has
come.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from tandem_runtime.kv.layout import Payload
from tandem_runtime.kv.tiers.backlog import Backlog
from tandem_runtime.kv.tiers.contract import Counted, Keeper, Look, Page, Source, Tier
from tandem_runtime.kv.tiers.following import Following
from tandem_runtime.kv.tiers.jobs import Jobs
from tandem_runtime.kv.tiers.kept import Keep, Kept, KeptPages
from tandem_runtime.kv.tiers.lookup import Fetched, Lookup
from tandem_runtime.kv.tiers.peer import Peers
from tandem_runtime.kv.tiers.policy import NOWHERE
from tandem_runtime.kv.tiers.speed import Speed
from tandem_runtime.prefix import KEY_BYTES, token_bytes, token_view
from tandem_runtime.protocol import Named, PrefillTarget

log = logging.getLogger(__name__)

_PROBE_PROMPTS: Final = 64
"""A tier that was too slow is tried again for one of so many prompts."""
_UNKNOWN_SHARE: Final = 0.25
"""Of computing a page, that loading one from a peer is taken to cost until one was loaded."""
_MOST_TENANTS: Final = 64
_BACKLOG_PAGES: Final = 16
"""Computed pages that may wait to be stored; further ones are not kept."""
_LOADED_PAGES: Final = 64
"""The same of loaded ones, which come all at once."""
_PAGES_AT_ONCE: Final = 4
"""That a tier is asked for. Then its speed is judged anew, and what has come can be taken."""


class TierCache:
    """Args:
    tiers: the pod's own, fastest first; only their jobs use them from here on.
    jobs: where they run.
    page_tokens: of a page.
    compute_s: what a token costs to compute, in seconds; a tier has to be faster.
    remote: the tier that is shared, and where its jobs run.
    peers: other pods, and where asking them runs.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        jobs: Jobs,
        *,
        page_tokens: int,
        compute_s: float,
        remote: tuple[Tier, Jobs] | None = None,
        peers: tuple[Peers, Jobs] | None = None,
    ) -> None:
        self.tiers = (*tiers, *(remote[:1] if remote else ()))
        self.sources: tuple[Counted, ...] = (*self.tiers, *(peers[:1] if peers else ()))
        self.page_tokens = page_tokens
        self.wake: Callable[[], None] = lambda: None
        """Called from the jobs' thread when `poll` has something."""
        self.hit_tokens: dict[tuple[str, str], int] = {}
        """By tier and tenant, of admitted prompts. The engine's thread counts."""
        self.decoded_hit_tokens: dict[str, int] = {}
        """By tier: those of pages that decode steps computed."""
        self._local = tuple(tiers)
        self._jobs = jobs
        self._remote = remote
        self._peers = peers
        self.page_compute_s = compute_s * page_tokens
        """What a page costs to compute."""
        self._done: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self._speeds = {tier.name: Speed() for tier in self.tiers}
        self._prompts = 0
        self._kept = KeptPages()
        self.following = Following(jobs, tiers, remote, page_tokens)
        """Of the engine's streams beyond their prompts."""
        # From the engine's thread and from the jobs' own: each has one writer.
        remote_jobs = remote[1] if remote else jobs
        self._computed = Backlog(jobs, _BACKLOG_PAGES)
        self._computed_remotely = Backlog(remote_jobs, _BACKLOG_PAGES)
        self._promoted = Backlog(jobs, _LOADED_PAGES)
        self._passed_on = Backlog(remote_jobs, _LOADED_PAGES)
        self._computed.woken = lambda: self.wake()  # who keeps a prompt may wait for room

    # -- from the engine's thread -----------------------------------------------------------------
    @property
    def keeps_below(self) -> bool:
        """Whether pages may be in a tier of which `tell` says nothing."""
        return self._remote is not None

    @property
    def peer_percent(self) -> int:
        """What a page of a peer costs, of what computing it does; 0: none is asked for."""
        if self._peers is None:
            return 0
        speed = self._peers[0].speed
        share = speed.likely_s / self.page_compute_s if speed.known else _UNKNOWN_SHARE
        return min(max(round(100 * share), 1), 100)

    def fetch(
        self,
        arrival: int,
        tenant: str,
        root: bytes,
        token_ids: Sequence[int],
        look: Look,
        *,
        keep: Keep | None = None,
        holder: PrefillTarget | None = None,
        begins: Named | None = None,
    ) -> None:
        """Look a prompt up and load what the accelerator does not hold of it; `poll` has it later.

        Args:
            arrival: the engine's number of the prompt; names the result.
            tenant: who asks.
            root: of the prompt's prefix keys.
            token_ids: the prompt; nobody changes the sequence meanwhile.
            look: what the accelerator holds need not be loaded; called from the jobs' thread.
            keep: pin the prompt's pages there; `kept` tells what came of it. One of the pod's own.
            holder: a pod that says it has more of the prompt than the accelerator here.
            begins: the named context that the prompt begins with.
        """
        fetched = Fetched(arrival, tenant=tenant)
        lookup = Lookup(fetched, root, token_ids, look, self.page_tokens, keep, holder, begins)
        self._jobs.put(partial(self._fetch, lookup), urgent=True)

    def kept(self, name: str, told: Callable[[Kept | None], None]) -> None:
        """Tell, from the jobs' thread and after all jobs so far, what is kept under a name."""
        self._jobs.put(lambda: told(self._kept.look(name)))

    def drop(self, name: str) -> None:
        """Keep nothing under this name any more; pages stay as long as they are worth it."""
        # In order with `fetch`: what is kept under the name from then on is not meant.
        self._jobs.put(lambda: self._kept.drop(name), urgent=True)

    def tell(self, gained: Callable[[bytes], None], lost: Callable[[bytes], None]) -> None:
        """Tell, from the jobs' thread, which pages the pod's own tiers hold, by key: those of now,
        and what changes. `lost` also takes keys of which `gained` was never told."""

        def told(key: bytes, here: bool) -> None:
            if here:
                gained(key)
            elif all(tier.policy.place(key) == NOWHERE for tier in self._local):
                lost(key)

        for tier in self._local:
            if isinstance(tier, Keeper):
                self._jobs.put(partial(tier.tell, told))

    def lend(self, key: bytes, tokens: bytes, told: Callable[[Page | None], None]) -> None:
        """Tell, from the jobs' thread, a page of one of the pod's own tiers, for another pod.

        Args:
            key: of the page.
            tokens: its token ids (`prefix.token_bytes`), which are compared.
            told: takes the page, or None.
        """
        self._jobs.put(lambda: told(self._lent(key, tokens)), urgent=True)

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

    def count(self, fetched: Fetched, first_page: int, pages: Collection[Page]) -> None:
        """The prompt's pages, from this one on, were taken."""
        skipped = first_page - fetched.first_page
        for tier, page in zip(fetched.tiers[skipped:], pages, strict=True):
            label = (tier, fetched.tenant)
            full = label not in self.hit_tokens and len(self.hit_tokens) >= _MOST_TENANTS
            if full and not any(fetched.tenant in one.policy.named for one in self.tiers):
                label = (tier, "other")
            self.hit_tokens[label] = self.hit_tokens.get(label, 0) + self.page_tokens
            if page.decoded:
                known = self.decoded_hit_tokens.get(tier, 0)
                self.decoded_hit_tokens[tier] = known + self.page_tokens

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
        for _, jobs in filter(None, (self._peers, self._remote)):
            jobs.close()
        if self._peers:
            self._peers[0].close()
        for tier in self.tiers:
            tier.close()

    # -- the pod's own tiers' jobs ----------------------------------------------------------------
    def _fetch(self, lookup: Lookup) -> None:
        fetched, asks = lookup.fetched, False
        try:
            lookup.tokens = token_view(lookup.token_ids)
            fetched.block_keys, fetched.keys, held_tokens = lookup.look(
                lookup.root, lookup.tokens, lookup.begins, self.page_tokens
            )
            fetched.first_page = held_tokens // self.page_tokens
            self._prompts += 1
            while self._load_run(lookup):
                pass
            asks = self._ask_others(lookup)
        except Exception:
            log.exception("the cache tiers failed; prompt %d is computed", fetched.arrival)
        if not asks:
            self._settle(lookup)

    def _lent(self, key: bytes, tokens: bytes) -> Page | None:
        for tier in self._local:
            if tier.lookup([key]) and (found := tier.load([key], [tokens])):
                return found[0]
        return None

    def _load_run(self, lookup: Lookup) -> bool:
        """Load successive pages from the fastest of the pod's tiers that has the next one."""
        first = lookup.next_page()
        for number, tier in enumerate(self._local):
            count = tier.lookup(
                lookup.fetched.keys[first : self._end(self._speeds[tier.name], lookup)]
            )
            for faster in self._local[:number]:
                ahead = lookup.fetched.keys[first + 1 : first + count]
                places = (n for n, key in enumerate(ahead, 1) if faster.lookup([key]))
                count = min(count, next(places, count))
            found = self._load(tier, self._speeds[tier.name], lookup, first, first + count)
            if found:
                lookup.local += found
                lookup.fetched.tiers += [tier.name] * len(found)
                return True
        return False

    def _end(self, speed: Speed, lookup: Lookup) -> int:
        """Up to which page to ask now: for one page while the speed is not known."""
        count = _PAGES_AT_ONCE if speed.known else 1
        return min(lookup.next_page() + count, lookup.most_pages)

    def _load(
        self, source: Source, speed: Speed, lookup: Lookup, first: int, end: int
    ) -> list[Page]:
        """Leading pages of [first, end), unless that takes longer than computing them."""
        slow = speed.page_s > self.page_compute_s and self._prompts % _PROBE_PROMPTS
        if first >= end or slow:
            return []
        begun_s = time.perf_counter()
        found = source.load(*lookup.span(first, end))
        if found:
            speed.measured((time.perf_counter() - begun_s) / len(found))
        return found

    def _ask_others(self, lookup: Lookup) -> bool:
        """Whether others are asked for the pages that the pod's own tiers do not have."""
        missing = lookup.most_pages - lookup.next_page()
        if missing < 1:
            return False
        lasts_s = missing * self.page_compute_s
        lookup.until_s = time.monotonic() + lasts_s
        if self._peers and lookup.holder:
            self._peers[1].put(partial(self._ask_peer, lookup, self._peers[0]), urgent=True)
        elif not self._asks_remote(lookup):
            return False
        self._jobs.later(lasts_s, partial(self._settle, lookup))
        return True

    def _asks_remote(self, lookup: Lookup) -> bool:
        """Whether the remote tier is asked for the pages that are still missing."""
        if self._remote is None or lookup.settled or lookup.next_page() >= lookup.most_pages:
            return False
        tier, jobs = self._remote
        if not tier.lookup(lookup.fetched.keys[-1:]):
            return False
        jobs.put(partial(self._ask_remote, lookup, tier), urgent=True)
        return True

    def _settle(self, lookup: Lookup) -> None:
        """All that will be loaded is; the prompt goes on, then pages go where they are wanted."""
        fetched = lookup.fetched
        if lookup.settled:
            keys = [fetched.keys[page] for page in lookup.wanted_remotely]
            if self._remote:
                self._passed_on.forget(self._remote[:1], keys)
            return
        lookup.settled = True
        came, lookup.others = lookup.others[:], []
        for name, page in came:
            lookup.local.append(page)
            fetched.tiers.append(name)
        fetched.pages = lookup.local
        stores = []
        try:
            stores = self._wants(lookup)
        except Exception:
            log.exception("the cache tiers failed; prompt %d is not kept", fetched.arrival)
        self._done.put(fetched)
        self.wake()
        for backlog, tier, page in stores:
            backlog.store((tier,), page)

    def _wants(self, lookup: Lookup) -> list[tuple[Backlog, Tier, Page]]:
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

    # -- the jobs of peers and of the remote tier ------------------------------------------------
    def _ask_peer(self, lookup: Lookup, peers: Peers) -> None:
        asks, fetched = False, lookup.fetched
        try:
            if lookup.holder and not lookup.settled:
                pages = peers.at(lookup.holder, fetched.block_keys, fetched.keys, lookup.until_s)
                self._load_all(pages, pages.speed, lookup)
                if lookup.others:
                    peers.speed = pages.speed
            asks = self._asks_remote(lookup)
        except Exception:
            log.exception("a peer's pages failed; prompt %d does without", fetched.arrival)
        if not asks:
            self._jobs.put(partial(self._settle, lookup), urgent=True)

    def _ask_remote(self, lookup: Lookup, tier: Tier) -> None:
        fetched = lookup.fetched
        try:
            self._load_all(tier, self._speeds[tier.name], lookup)
            if not lookup.settled:
                lookup.wanted_remotely = tier.use(fetched.tenant, fetched.keys)
        except Exception:
            log.exception("the remote tier failed; prompt %d does without", fetched.arrival)
        self._jobs.put(partial(self._settle, lookup), urgent=True)

    def _load_all(self, source: Source, speed: Speed, lookup: Lookup) -> None:
        """Successive pages, as long as they come and the prompt waits for them."""
        found = True
        while found and not lookup.settled and lookup.next_page() < lookup.most_pages:
            first, end = lookup.next_page(), self._end(speed, lookup)
            came = self._load(source, speed, lookup, first, end)
            lookup.others += [(source.name, page) for page in came]
            found = len(came) == end - first
