"""Streams and the cache tiers. A prompt is looked up before it queues; what was found is written
into its blocks between steps; what the tiers want of it is copied out when it is computed.

An engine without tiers has one of these, too, which lets everything pass.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Final

from tandem_runtime.engine.flight import Runner
from tandem_runtime.engine.lending import Lending
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Sequence
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.kv.tiers.following import Followed

LOADING_S: Final = 0.001
"""Of a step, for writing pages that came from cache tiers; one piece at least."""
CPU_PIECE_BYTES: Final = 1 << 20
GPU_PIECE_BYTES: Final = 8 << 20
"""Of a page, in which it is written: less than half a millisecond. At least a layer."""
PAGES_OFFERED: Final = 2
"""To cache tiers, of one stream and step."""


class Tiered:
    """What an engine does between its steps for pages of cache tiers."""

    def __init__(
        self,
        tiers: TierCache | None,
        scheduler: Scheduler,
        runner: Runner,
        lending: Lending,
        layers: int,
    ) -> None:
        self.observe: Callable[[float], None] = lambda seconds: None
        """Told how long streams were kept from the next step, in seconds, where they were."""
        self._layers = layers
        self._piece_bytes = GPU_PIECE_BYTES if runner.overlaps else CPU_PIECE_BYTES
        self._tiers = tiers
        self._scheduler = scheduler
        self._runner = runner
        if tiers is not None:
            tiers.tell(scheduler.pool.pages.gained, scheduler.pool.pages.lost)
            if lending.possible:
                tiers.following.read = lending.read

    # -- before a stream runs ---------------------------------------------------------------------
    def queue(self, sequence: Sequence) -> None:
        """A new sequence joins the queue, by way of the tiers if it fills a page."""
        if self._tiers is None or sequence.known_tokens < self._tiers.page_tokens:
            self._scheduler.waiting.append(sequence)
            return
        self._scheduler.fetch(sequence)
        asked, look = sequence.request, self._scheduler.prefixes.look
        ids = sequence.token_ids[:] if asked.output_ids else asked.prompt_ids
        self._tiers.fetch(
            sequence.arrival,
            asked.tenant,
            sequence.root,
            ids,
            look,
            keep=asked.keep,
            holder=asked.holder,
            begins=asked.begins,
        )

    @property
    def ready(self) -> bool:
        """Whether a prompt's look-up has ended."""
        return self._tiers is not None and self._tiers.ready

    def before_step(self) -> None:
        """Queue the prompts that were looked up, and write a little of their pages."""
        if self._tiers is None or not (self._tiers.ready or self.loads_kv):
            return
        begun_s = perf_counter()
        self._take_fetched(self._tiers)
        self._write_loads(begun_s + LOADING_S)
        self.observe(perf_counter() - begun_s)

    def _take_fetched(self, tiers: TierCache) -> None:
        for fetched in tiers.poll():
            fetching = self._scheduler.fetching
            sequence = next((s for s in fetching if s.arrival == fetched.arrival), None)
            if sequence is None:
                tiers.leave(fetched)  # it ended meanwhile, or is another pod's
                continue
            sequence.fetched = fetched
            if not sequence.keys:
                sequence.keys, fetched.block_keys = fetched.block_keys, []
            self._scheduler.fetched(sequence)

    # -- while it runs ----------------------------------------------------------------------------
    @property
    def loads_kv(self) -> bool:
        """Whether pages are still to be written."""
        return any(s.loads for s in self._scheduler.running)

    def _write_loads(self, until_s: float) -> None:
        """Write pages of streams that were admitted with some, in pieces; the rest comes later."""
        for sequence in [s for s in self._scheduler.running if s.loads]:
            while sequence.loads:
                self._write_piece(sequence)
                if perf_counter() >= until_s:
                    return

    def _write_piece(self, sequence: Sequence) -> None:
        """A few layers of the stream's next page."""
        page = memoryview(sequence.loads[0].payload).cast("B")
        layer_bytes = page.nbytes // self._layers
        first = sequence.loaded_layers
        end = min(first + max(1, self._piece_bytes // layer_bytes), self._layers)
        piece = page[first * layer_bytes : end * layer_bytes]
        blocks, start = sequence.block_ids, sequence.computed_tokens
        self._runner.write_kv(blocks, start, piece, range(first, end))
        sequence.loaded_layers = end
        if end == self._layers:
            self._scheduler.loaded(sequence)

    def count(self, sequence: Sequence) -> None:
        """It was admitted for the first time, with the pages that it has to load."""
        if self._tiers is not None and sequence.fetched is not None and sequence.loads:
            page = sequence.computed_tokens // self._tiers.page_tokens
            self._tiers.count(sequence.fetched, page, sequence.loads)

    def offer(self, sequence: Sequence) -> None:
        """Give the tiers computed pages that they want, and say which others a stream fills."""
        if self._tiers is not None:
            self._offer_wanted(self._tiers, sequence)
            self._follow(self._tiers, sequence)

    def _offer_wanted(self, tiers: TierCache, sequence: Sequence) -> None:
        """A few in each step.

        Of an export all of them: it is in no step any more when its prompt is computed. Of one that
        is to be kept as many as there is room for; `offered` hands over the rest.
        """
        if sequence.fetched is None or not sequence.fetched.wanted:
            return
        size = tiers.page_tokens
        computed = [
            p for p in sequence.fetched.wanted if (p + 1) * size <= sequence.computed_tokens
        ]
        most = len(computed) if sequence.request.export else PAGES_OFFERED
        if sequence.request.keep is not None:
            most = min(most, max(tiers.room_pages, 0))
        for page in sorted(computed)[:most]:
            payload = self._runner.read_kv(sequence.block_ids, page * size, (page + 1) * size)
            tiers.offer(sequence.fetched, page, sequence.token_ids, payload)

    def _follow(self, tiers: TierCache, sequence: Sequence) -> None:
        """Pages that came from a prefill pod, or that decode steps have filled: all of which the
        look-up of its prompt said nothing."""
        end, stream = sequence.computed_tokens // tiers.page_tokens, sequence.followed
        if sequence.request.export or tiers.following.read is None:
            return
        if stream is None:
            keys = list(sequence.fetched.keys) if sequence.fetched is not None else []
            stream = Followed(
                sequence.request.tenant, sequence.root, sequence.asked_tokens, keys, len(keys)
            )
            sequence.followed = stream
        first, blocks = stream.pages, tiers.page_tokens // self._scheduler.block_tokens
        if stream.lost or first >= end or len(sequence.keys) < end * blocks:
            return
        ids = sequence.token_ids[first * tiers.page_tokens : end * tiers.page_tokens]
        tiers.following.fill(stream, ids, sequence.keys[first * blocks : end * blocks])

    def offered(self, sequence: Sequence) -> bool:
        """Whether the tiers have all that they want of a computed export; offers what they take."""
        self.offer(sequence)
        return sequence.fetched is None or not sequence.fetched.wanted

    def leave(self, sequence: Sequence) -> None:
        """The stream has ended."""
        if self._tiers is not None and sequence.fetched is not None:
            self._tiers.leave(sequence.fetched)

    def close(self) -> None:
        """After what was offered is stored."""
        if self._tiers is not None:
            self._tiers.close()
