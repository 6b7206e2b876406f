"""Who computes what in the next step, and who gives way when blocks run out.

One budget of tokens for each step. Running sequences that only need their next token (decodes) come
first, then running prefills in order of arrival, then the queue; prefills take what the budget
leaves, so a long prompt is computed in chunks while others go on.

Blocks: a sequence is admitted only with blocks for all its known tokens, so a prefill never waits
half-way. Decodes grow block by block; when none is left the youngest running sequence is
preempted: its blocks go back to the pool and it recomputes later, or gets the copy back that was
made (swap.py). The oldest is never preempted and each fits the pool alone, so the queue moves.

Blocks of a step in flight are nobody else's until it ends: preemption waits for that, and so do the
blocks of a stream that ends meanwhile.

Against thrashing: admission leaves room for every running sequence, and the new one, to grow by
`growth_reserve_tokens`. A preempted sequence is therefore not readmitted only to push out, or to be
pushed out by, its neighbours in the next few steps.

Streams whose KV comes from another pod: the first grant is given only when the pool could hold the
rest of the prompt beside what other such streams still have coming (their *promise*); a later grant
then always succeeds, if need be by preempting. Two of them never starve each other. First grants
and the queue keep to one order of arrival, so neither starves the other.

Streams that another pod takes over: frozen ones keep their blocks and are in no step. When a
promise can be kept in no other way, a frozen one loses its blocks; if nobody takes it, it waits.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.batch import Work
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.prefixes import Prefixes
from tandem_runtime.engine.sequence import Grant, Sequence, State
from tandem_runtime.engine.swap import Swap
from tandem_runtime.kv.tiers.contract import Page

GROWTH_RESERVE_TOKENS: Final = 64
MAY_FREEZE: Final = (State.RUNNING, State.WAITING, State.FETCHING)


@dataclass(frozen=True)
class Plan:
    """One step."""

    works: list[Work]
    admitted: list[Sequence]
    preempted: list[Sequence]


class Scheduler:
    """The queue, the running set and the rules above. Knows nothing of tensors or time."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_tokens: int,
        max_batch_tokens: int,
        max_running: int,
        prefix_caching: bool = True,
        growth_reserve_tokens: int = GROWTH_RESERVE_TOKENS,
        swap: Swap | None = None,
        page_tokens: int = KV_PAGE_TOKENS,
    ) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.growth_reserve_tokens = growth_reserve_tokens
        self.swap = swap
        self.page_tokens = page_tokens
        self.prefixes = Prefixes(pool, block_tokens, caching=prefix_caching)
        self.waiting: list[Sequence] = []
        """Oldest first; a preempted sequence goes back to its place."""
        self.running: list[Sequence] = []
        """Oldest first."""
        self.fetching: list[Sequence] = []
        self.receiving: list[Sequence] = []
        self.held: list[Sequence] = []
        self.frozen: list[Sequence] = []
        self.leaving: list[Sequence] = []
        self._places = {
            State.WAITING: self.waiting,
            State.RUNNING: self.running,
            State.FETCHING: self.fetching,
            State.RECEIVING: self.receiving,
            State.HELD: self.held,
            State.FROZEN: self.frozen,
            State.LEAVING: self.leaving,
        }

    # -- a step -----------------------------------------------------------------------------------
    def schedule(self, *, settled: bool = True) -> Plan | None:
        """Choose the next step's work. Afterwards every work's sequence has the blocks it needs.

        Args:
            settled: no step is in flight.

        Returns:
            None if somebody must give way: blocks in flight cannot be taken, so call again when
            that step has ended.
        """
        preempted = []
        ready = [s for s in self.running if s.ready]
        for sequence in ready:
            while sequence.state is State.RUNNING and not self._grow(sequence):
                if not settled:
                    return None
                preempted.append(self._preempt_youngest())
        works: list[Work] = []
        budget = self.max_batch_tokens
        ready = [s for s in ready if s.state is State.RUNNING]
        decodes = [s for s in ready if s.remaining_tokens == 1]
        prefills = [s for s in ready if s.remaining_tokens > 1]
        for sequence in decodes + prefills:
            budget -= self._add_work(works, sequence, budget)
        admitted = []
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            admitted.append(sequence)
            if sequence.ready:
                budget -= self._add_work(works, sequence, budget)
        return Plan(works, admitted, preempted)

    def _add_work(self, works: list[Work], sequence: Sequence, budget: int) -> int:
        count = min(sequence.remaining_tokens, budget)
        if count > 0:
            start = sequence.computed_tokens + sequence.in_flight_tokens
            works.append(Work(sequence, start, count))
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Give it a block for its newest token, if there is one."""
        missing = self.blocks_for(sequence.known_tokens) - len(sequence.block_ids)
        if missing > self.pool.free_blocks:
            return False
        if missing > 0:
            sequence.block_ids += self.pool.allocate(missing)
        return True

    def launch(self, works: list[Work]) -> None:
        """These are in flight, in the order of the batch."""
        samples = 0
        for work in works:
            work.sequence.in_flight_tokens += work.count
            if work.samples:
                work.sequence.pending_tokens += 1
                work.sequence.pending_sample = samples
                samples += 1

    def land(self, work: Work) -> bool:
        """The work's step has ended; False if its stream ended before, and leaves with it."""
        sequence = work.sequence
        sequence.in_flight_tokens -= work.count
        sequence.pending_tokens -= work.samples
        if sequence.state is not State.LEAVING:
            return True
        self.remove(sequence)
        return False

    def commit(self, work: Work) -> None:
        """The work's tokens are computed: their full blocks can serve other streams."""
        work.sequence.computed_tokens = work.start + work.count
        self.prefixes.register(work.sequence)

    # -- admission --------------------------------------------------------------------------------
    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if there is room; the caller takes it out of the queue."""
        if self._full:
            return False
        if any(s.refused_grant and s.arrival < sequence.arrival for s in self.receiving):
            return False
        hits = self.prefixes.match(sequence)
        swaps = self.swap and self.swap.pays_back(sequence, len(hits) * self.block_tokens)
        hits = [] if swaps else hits
        loads = [] if swaps else self._loads(sequence, hits)
        missing = self.blocks_for(sequence.known_tokens) - len(hits)
        reserve = self._promised_blocks()
        if self.running:
            reserve += self._growth_reserve(sequence)
        if missing + self.pool.unheld(hits) + reserve > self.pool.free_blocks:
            return False
        self._take(sequence, hits, missing)
        sequence.computed_tokens = len(hits) * self.block_tokens
        sequence.loads = deque(loads)
        if sequence.fetched is not None:
            sequence.fetched.pages = []  # what is not taken now is of no more use
        if self.swap:
            if swaps:
                sequence.computed_tokens = self.swap.back(sequence)
            self.swap.drop(sequence)
        if sequence.preemptions == 0:
            cached_tokens = sequence.computed_tokens + len(loads) * self.page_tokens
            sequence.cached_tokens = min(cached_tokens, sequence.prompt_tokens)
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)
        return True

    def _loads(self, sequence: Sequence, hits: list[int]) -> list[Page]:
        """Pages that go on where the hits end; these are cut to whole pages if there are any."""
        page = len(hits) * self.block_tokens // self.page_tokens
        loads = sequence.fetched.pages_from(page) if sequence.fetched is not None else []
        if loads:
            del hits[page * self.page_tokens // self.block_tokens :]
        return loads

    def loaded(self, sequence: Sequence) -> None:
        """The first of its loads is in its blocks."""
        page, sequence.loaded_layers = sequence.loads.popleft(), 0
        sequence.computed_tokens += self.page_tokens
        self.prefixes.register(sequence, decoded=page.decoded)

    def fetch(self, sequence: Sequence) -> None:
        """Await what the cache tiers have of a new sequence."""
        sequence.state = State.FETCHING
        self.fetching.append(sequence)

    def fetched(self, sequence: Sequence) -> None:
        """The tiers have answered: it queues in its place."""
        self.fetching.remove(sequence)
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def _growth_reserve(self, newcomer: Sequence) -> int:
        """Blocks that keep the running sequences and the newcomer going for a while."""
        reserve = 0
        for s in [*self.running, newcomer]:
            upto_tokens = s.known_tokens + min(s.growth_tokens, self.growth_reserve_tokens)
            has = max(self.blocks_for(s.known_tokens), len(s.block_ids))
            reserve += max(self.blocks_for(upto_tokens) - has, 0)  # one taken over has more
        return reserve

    def _take(self, sequence: Sequence, hits: list[int], missing: int) -> None:
        self.pool.hold(hits)
        sequence.block_ids = hits + self.pool.allocate(missing)
        sequence.registered_blocks = len(hits)

    # -- giving way -------------------------------------------------------------------------------
    def _preempt_youngest(self) -> Sequence:
        """No step is in flight. Exports are spared: another pod is reading their blocks, and they
        do not grow."""
        victims = [s for s in self.running if not s.request.export]
        if not victims:
            return self._rob_frozen()
        victim = victims[-1]
        self.running.remove(victim)
        if self.swap:
            self.swap.out(victim)
        self._drop_blocks(victim)
        victim.state = State.WAITING
        victim.preemptions += 1
        insort(self.waiting, victim, key=lambda s: s.arrival)
        return victim

    def _rob_frozen(self) -> Sequence:
        victims = [s for s in self.frozen if s.block_ids]
        assert victims, "blocks were promised that nobody can give back"
        self._drop_blocks(victims[-1])
        victims[-1].preemptions += 1
        return victims[-1]

    def freeze(self, sequence: Sequence) -> None:
        """Take a sequence out of the steps to come. Raises ValueError where it is in none."""
        if sequence.state is State.FROZEN:
            return
        if sequence.state not in MAY_FREEZE or sequence.request.export:
            raise ValueError(f"{sequence.request_id} is not decoded here")
        self._places[sequence.state].remove(sequence)
        if self.swap:
            self.swap.drop(sequence)
        sequence.state = State.FROZEN
        self.frozen.append(sequence)

    def thaw(self, sequence: Sequence) -> None:
        """Back to where it stood."""
        self.frozen.remove(sequence)
        runs = bool(sequence.block_ids)
        sequence.state = State.RUNNING if runs else State.WAITING
        insort(self.running if runs else self.waiting, sequence, key=lambda s: s.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; its blocks go back when no step uses them."""
        self._places[sequence.state].remove(sequence)
        if self.swap:
            self.swap.drop(sequence)
        if sequence.in_flight_tokens:
            sequence.state = State.LEAVING
            self.leaving.append(sequence)
        else:
            self._drop_blocks(sequence)

    def hold(self, sequence: Sequence) -> None:
        """A running export is computed: keep its blocks, read-only."""
        self.running.remove(sequence)
        sequence.state = State.HELD
        self.held.append(sequence)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.loads, sequence.loaded_layers = deque(), 0
        sequence.computed_tokens = 0
        sequence.registered_blocks = 0

    # -- KV from another pod ----------------------------------------------------------------------
    def expect(self, sequence: Sequence) -> None:
        """Await a sequence's KV; it has no blocks until granted."""
        sequence.state = State.RECEIVING
        self.receiving.append(sequence)

    def lacks_room(self, sequence: Sequence, upto_tokens: int) -> bool:
        """Whether a promised grant would have to preempt, for which no step may be in flight."""
        return sequence.granted and self._missing(sequence, upto_tokens) > self.pool.free_blocks

    def _missing(self, sequence: Sequence, upto_tokens: int) -> int:
        upto_tokens = min(upto_tokens, sequence.expected_tokens)
        return self.blocks_for(upto_tokens) - len(sequence.block_ids)

    def grant(self, sequence: Sequence, upto_tokens: int) -> Grant | None:
        """Blocks for the first `upto_tokens` tokens, or None when there is no room now."""
        if not sequence.granted and not self._first_grant(sequence):
            sequence.refused_grant = True
            return None
        missing = self._missing(sequence, upto_tokens)
        while missing > self.pool.free_blocks:
            self._preempt_youngest()
        if missing > 0:
            sequence.block_ids += self.pool.allocate(missing)
        granted = min(len(sequence.block_ids) * self.block_tokens, sequence.expected_tokens)
        return Grant(sequence.cached_tokens, granted)

    def _first_grant(self, sequence: Sequence) -> bool:
        """Hold what the prefix cache has of the stream, if the rest of it can be promised."""
        if self._full:
            return False
        if self.waiting and self.waiting[0].arrival < sequence.arrival:
            return False
        # A stream that another pod decodes is resumed by computing its last known token.
        decoded = sequence.headroom_tokens > 0
        hits = self.prefixes.match_upto(sequence, sequence.known_tokens - decoded)
        missing = self.blocks_for(sequence.expected_tokens) - len(hits)
        room = self.pool.free_blocks - self.pool.unheld(hits) - self._promised_blocks()
        if missing > room:
            return False
        self._take(sequence, hits, 0)
        sequence.computed_tokens = sequence.cached_tokens = len(hits) * self.block_tokens
        sequence.granted, sequence.refused_grant = True, False
        return True

    @property
    def _full(self) -> bool:
        """Whether no further sequence may run: a frozen one may be wanted again."""
        frozen = sum(bool(s.block_ids) for s in self.frozen)
        return len(self.running) + frozen + len(self._granted()) >= self.max_running

    def _granted(self) -> list[Sequence]:
        return [s for s in self.receiving if s.granted]

    def _promised_blocks(self) -> int:
        """Blocks that granted streams will still ask for."""
        return sum(self.blocks_for(s.expected_tokens) - len(s.block_ids) for s in self._granted())

    def start(self, sequence: Sequence) -> None:
        """A receiving sequence runs, and others may share its blocks."""
        self.receiving.remove(sequence)
        sequence.headroom_tokens = 0
        self.prefixes.register(sequence)
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)

    # -- counting ---------------------------------------------------------------------------------
    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pool and sequences agree. For tests and idling."""
        self.pool.check_integrity()
        kept = [*self.held, *self.frozen, *self.leaving]
        holders = [*self.running, *self.receiving, *kept]
        self.pool.check_references(Counter(b for s in holders for b in s.block_ids))
        if self.swap:
            self.swap.check_integrity(self.waiting)
        for sequence in [*self.waiting, *self.fetching]:
            assert not sequence.block_ids, f"{sequence.request_id} waits with blocks"
        for sequence in [*self.running, *kept]:
            launched = sequence.computed_tokens + sequence.in_flight_tokens
            assert launched <= len(sequence.block_ids) * self.block_tokens
        for sequence in self.leaving:
            assert sequence.in_flight_tokens, f"{sequence.request_id} leaves, but is in no step"
