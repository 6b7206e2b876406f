"""An engine without a model: a slot's KV is the token that was written there."""

from __future__ import annotations

from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine, Payload
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.protocol import Sampling

BLOCK = 4
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")


class LedgerRunner:
    """Stands in for the model: a slot's KV is the token that was written there.

    It refuses to read what was not written, so a wrong block table is found at once; the token it
    samples is a function of the whole context.
    """

    def __init__(self, blocks: int) -> None:
        self.slots: list[int | None] = [None] * (blocks * BLOCK)

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

    def write_kv(self, block_ids: list[int], start: int, payload: Payload) -> None:
        data = bytes(payload)
        for index in range(len(data) // 8):
            position = start + index
            token = int.from_bytes(data[8 * index : 8 * index + 8], "little")
            self.slots[block_ids[position // BLOCK] * BLOCK + position % BLOCK] = token


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
) -> Engine:
    scheduler = Scheduler(
        BlockPool(blocks + 1),
        block_tokens=BLOCK,
        max_batch_tokens=budget,
        max_running=running,
        prefix_caching=caching,
        growth_reserve_tokens=reserve,
    )
    return Engine(
        scheduler,
        LedgerRunner(blocks + 1),
        layout=LAYOUT,
        layout_hash=b"layout",
        vocab_size=97,
        max_context_tokens=200,
        eos_token_ids=frozenset(),
    )


def ask(name: str, prompt: list[int], max_tokens: int = 4, export: bool = False) -> Request:
    return Request(name, prompt, Sampling(max_tokens=max_tokens, temperature=0.0), export=export)
