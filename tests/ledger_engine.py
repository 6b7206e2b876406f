"""An engine without a model: a slot's KV is the token that was written there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.engine.swap import Rates, Swap
from tandem_runtime.kv.layout import KvLayout, Payload
from tandem_runtime.protocol import Sampling

BLOCK = 4
SWAPS = Rates(compute_s=3, copy_s=1)
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")


class LedgerRunner:
    """Stands in for the model: a slot's KV is the token that was written there.

    It refuses to read what was not written, so a wrong block table is found at once; the token it
    samples is a function of the whole context.
    """

    overlaps = False
    reads_beside = True

    def __init__(self, blocks: int) -> None:
        self.slots: list[int | None] = [None] * (blocks * BLOCK)

    def launch(self, batch: Batch) -> Any:
        return self.run(batch)

    def collect(self, launched: Any) -> list[SampledToken]:
        return launched

    def run(self, batch: Batch) -> list[SampledToken]:
        for slot, token in zip(batch.slots, batch.token_ids, strict=True):
            assert slot >= BLOCK, "a row of a stream writes to the scrap block"
            self.slots[slot] = token
        assert len(set(batch.slots)) == len(batch.slots), "two rows write to one slot"
        contexts, row = {}, -1
        for sequence, count in enumerate(batch.query_tokens):
            row += count
            table = batch.block_tables[sequence]
            context = [self._read(table, p) for p in range(batch.context_tokens[sequence])]
            assert context[-count:] == batch.token_ids[row - count + 1 : row + 1]
            contexts[row] = context
        return [SampledToken(next_token(contexts[sample.row])) for sample in batch.samples]

    def _read(self, table: list[int], position: int) -> int:
        token = self.slots[table[position // BLOCK] * BLOCK + position % BLOCK]
        assert token is not None, "KV is read that was never written"
        return token

    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        tokens = [self._read(block_ids, position) for position in range(start, end)]
        return memoryview(b"".join(token.to_bytes(8, "little") for token in tokens))

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        return self.read_kv(block_ids, start, end)

    def write_kv(self, block_ids: list[int], start: int, payload: Payload) -> None:
        data = bytes(payload)
        for index in range(len(data) // 8):
            position = start + index
            token = int.from_bytes(data[8 * index : 8 * index + 8], "little")
            self.slots[block_ids[position // BLOCK] * BLOCK + position % BLOCK] = token

    def close(self) -> None:
        pass


class DelayedRunner(LedgerRunner):
    """Computes a step as late as it may, when its tokens are collected: whatever the engine does to
    blocks in between shows. It watches the blocks of steps in flight, too."""

    overlaps = True
    reads_beside = True

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.flights: list[Batch] = []
        self.chosen: list[int] = []
        """By the newest step that was computed."""
        self.deepest = 0

    def launch(self, batch: Batch) -> Batch:
        self._assert_unused(slot // BLOCK for slot in batch.slots)
        pending = [-1 - token for token in batch.token_ids if token < 0]
        if pending:
            assert len(self.flights) == 1, "a token is awaited of no step in flight"
            assert max(pending) < len(self.flights[0].samples)
            assert len(set(pending)) == len(pending), "two rows await one token"
        for sample in batch.samples:
            if sample.sampling.needs_history:
                assert batch.token_ids[sample.row] >= 0, "it needs its history, and runs ahead"
        self.flights.append(batch)
        self.deepest = max(self.deepest, len(self.flights))
        return batch

    def collect(self, launched: Batch) -> list[SampledToken]:
        assert launched is self.flights.pop(0), "steps are collected out of order"
        ids = [t if t >= 0 else self.chosen[-1 - t] for t in launched.token_ids]
        tokens = self.run(replace(launched, token_ids=ids))
        self.chosen = [token.token_id for token in tokens]
        return tokens

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        return self.read_kv(block_ids, start, end)

    def write_kv(self, block_ids: list[int], start: int, payload: Payload) -> None:
        end = start + len(payload) // 8
        self._assert_unused(block_ids[start // BLOCK : -(-end // BLOCK)], own=False)
        super().write_kv(block_ids, start, payload)

    def blocks_in_flight(self) -> set[int]:
        return {i for batch in self.flights for table in batch.block_tables for i in table}

    def _assert_unused(self, written: Iterable[int], *, own: bool = True) -> None:
        """A step may write on into its own stream's blocks, which only the table's end can be."""
        ends = {table[-1] for batch in self.flights for table in batch.block_tables}
        touched = set(written) & self.blocks_in_flight()
        assert touched <= (ends if own else set()), "a block in flight is written to"


def next_token(context: list[int]) -> int:
    return sum((i + 1) * token for i, token in enumerate(context)) % 97


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def make(
    blocks: int = 20,
    budget: int = 8,
    running: int = 4,
    reserve: int = 0,
    caching: bool = True,
    runner: type[LedgerRunner] = LedgerRunner,
    swap_tokens: int = 0,
    rates: Rates = SWAPS,
) -> Engine:
    computes = runner(blocks + 1)
    capacity_bytes = swap_tokens * LAYOUT.token_bytes
    swap = Swap(computes, rates, token_bytes=LAYOUT.token_bytes, capacity_bytes=capacity_bytes)
    scheduler = Scheduler(
        BlockPool(blocks + 1),
        block_tokens=BLOCK,
        max_batch_tokens=budget,
        max_running=running,
        prefix_caching=caching,
        growth_reserve_tokens=reserve,
        swap=swap if swap_tokens else None,
    )
    return Engine(
        scheduler,
        computes,
        layout=LAYOUT,
        layout_hash=b"layout",
        vocab_size=97,
        max_context_tokens=200,
        eos_token_ids=frozenset(),
    )


def ask(
    name: str,
    prompt: list[int],
    max_tokens: int = 4,
    export: bool = False,
    stops: tuple[int, ...] = (),
    history: bool = False,
) -> Request:
    sampling = Sampling(
        max_tokens, temperature=0.0, stop_token_ids=stops, presence_penalty=0.5 if history else 0.0
    )
    return Request(name, prompt, sampling, export=export)
