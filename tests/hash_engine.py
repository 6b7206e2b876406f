"""An engine whose model is a hash: quick, torch-free, and wrong at once if any KV is wrong.

The KV of a token is a hash of its id and position; the next token is a hash of the KV of all tokens
before it, as found in the cache. A block mixed up, lost or damaged anywhere changes the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kv.layout import KvLayout, Payload
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.protocol import TokenLogprob

BLOCK_TOKENS = 16
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=2, dtype="float32")
HALF_BYTES = LAYOUT.token_bytes // 2
VOCAB_SIZE = 256


class HashRunner:
    overlaps = False
    reads_beside = True

    def __init__(self, blocks: int, step_s: float = 0.0) -> None:
        self.cache = np.zeros((blocks * BLOCK_TOKENS, 2, HALF_BYTES), dtype=np.uint8)
        self.step_s = step_s
        self.before_step: Callable[[Batch], None] = lambda batch: None
        self.not_finite: Callable[[SampleRow], bool] = lambda sample: False

    def collect(self, launched: list[SampledToken | None]) -> list[SampledToken | None]:
        return launched

    def launch(self, batch: Batch) -> list[SampledToken | None]:
        self.before_step(batch)
        if self.step_s:
            time.sleep(self.step_s)
        for token_id, position, slot in zip(
            batch.token_ids, batch.positions, batch.slots, strict=True
        ):
            self.cache[slot] = _kv(token_id, position)
        rows = {}
        row = 0
        for count, context, table in zip(
            batch.query_tokens, batch.context_tokens, batch.block_tables, strict=True
        ):
            row += count
            rows[row - 1] = (context, table)
        sampled: list[SampledToken | None] = []
        for sample in batch.samples:
            if self.not_finite(sample):
                sampled.append(None)
                continue
            context, table = rows[sample.row]
            context_kv = self.cache[_slots(table, 0, context)].tobytes()
            sampled.append(_token(context_kv, sample.sampling.seed, sample.sampling.logprobs))
        return sampled

    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        tokens = self.cache[_slots(block_ids, start, end)]
        return memoryview(np.ascontiguousarray(tokens.transpose(1, 0, 2)).tobytes())

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        return self.read_kv(block_ids, start, end)

    def write_kv(
        self, block_ids: list[int], start: int, payload: Payload, layers: range | None = None
    ) -> None:
        tokens = np.frombuffer(payload, dtype=np.uint8).reshape(2, -1, HALF_BYTES)
        slots = _slots(block_ids, start, start + tokens.shape[1])
        self.cache[slots] = tokens.transpose(1, 0, 2)

    def close(self) -> None:
        pass


def hash_engine(
    *,
    blocks: int = 64,
    max_batch_tokens: int = 64,
    max_running: int = 16,
    step_s: float = 0.0,
    eos_token_ids: frozenset[int] = frozenset(),
    runner: HashRunner | None = None,
    tiers: Callable[[KvLayout, bytes], TierCache] | None = None,
    prefix_secret: bytes = b"",
) -> Engine:
    """`blocks` of 16 tokens; the context is 8192."""
    layout_hash = LAYOUT.hash("hash model")
    return Engine(
        Scheduler(
            BlockPool(blocks + 1),
            block_tokens=BLOCK_TOKENS,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
        ),
        runner or HashRunner(blocks + 1, step_s),
        layout=LAYOUT,
        layout_hash=layout_hash,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=8192,
        eos_token_ids=eos_token_ids,
        prefix_secret=prefix_secret,
        tiers=tiers(LAYOUT, layout_hash) if tiers else None,
    )


def continuation(prompt_ids: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """What any correct engine generates after `prompt_ids`."""
    ids = list(prompt_ids)
    kv = b"".join(_kv(token_id, n).tobytes() for n, token_id in enumerate(ids))
    for _ in range(count):
        token = _token(kv, seed, None).token_id
        kv += _kv(token, len(ids)).tobytes()
        ids.append(token)
    return ids[len(prompt_ids) :]


def _kv(token_id: int, position: int) -> np.ndarray:
    digest = blake2b(f"{token_id}@{position}".encode(), digest_size=2 * HALF_BYTES).digest()
    return np.frombuffer(digest, dtype=np.uint8).reshape(2, HALF_BYTES)


def _slots(table: Sequence[int], start: int, end: int) -> np.ndarray:
    positions = np.arange(start, end)
    return np.asarray(table)[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS


def _token(context_kv: bytes, seed: int, logprobs: int | None) -> SampledToken:
    digest = blake2b(context_kv, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    token_id = digest[0]
    if logprobs is None:
        return SampledToken(token_id)
    value = -digest[1] / 64
    top = tuple(TokenLogprob((token_id + n) % VOCAB_SIZE, value - n) for n in range(logprobs))
    return SampledToken(token_id, value, top)
