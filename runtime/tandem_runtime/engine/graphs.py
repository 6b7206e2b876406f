"""CUDA graphs of decode steps: one for each number of rows, whatever the lengths of the streams.

A graph reads the step's integers (`attention_plan`) from one buffer, which a copy fills before it
is replayed, and counts there how much work there is; rows of padding attend to nothing and write to
the scrap block. Graphs run one after the other, so they share their memory.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.blocks import SCRAP_BLOCK
from tandem_runtime.kernels.attention_plan import (
    ITEM,
    SPLIT_TOKENS,
    HostWork,
    Step,
    plan_gpu,
    staged,
    work_at,
)
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.model.decoder import Decoder

MAX_ROWS: Final = 256
"""Beyond these a step is long enough to hide its launches."""
COLUMNS: Final = 3
"""Integers of a row: token id, position, slot."""


def row_counts(max_running: int) -> list[int]:
    """Rows that graphs are made for: 1, 2, 4, then every 8, up to `max_running`."""
    most = min(max_running, MAX_ROWS)
    counts = [1, 2, 4, *range(8, MAX_ROWS + 1, 8)]
    return [count for count in counts if count < most] + [most]


class DecodeGraphs:
    """Captured when it is made; needs a GPU.

    Args:
        model: what computes.
        cache: where KV is.
        chosen: [max_running] int64, the ids that the newest step chose.
    """

    def __init__(self, model: Decoder, cache: KvCache, chosen: Tensor) -> None:
        self._model = model
        self._cache = cache
        self._chosen = chosen
        self._counts = row_counts(len(chosen))
        device, most = cache.data.device, self._counts[-1]
        self._splits = most_splits(most, cache, model.context_tokens)
        self._ints = torch.zeros(
            buffer_ints(most, self._splits, cache.block_tokens), dtype=torch.int32, device=device
        )
        self._logits = torch.empty((most, model.config.vocab_size), device=device)
        pool = torch.cuda.graph_pool_handle()
        # The widest first: the others find room in its memory.
        self._graphs = {rows: self._capture(rows, pool) for rows in reversed(self._counts)}

    def replay(self, batch: Batch, step: Step) -> Tensor | None:
        """Logits of a step's rows, until the next replay; None if it is no such step."""
        rows = len(step.query_tokens)
        if rows > self._counts[-1] or step.decodes < rows or len(batch.samples) < rows:
            return None
        padded = self._counts[bisect_left(self._counts, rows)]
        work = plan_gpu(step, 1, decodes=padded)
        if len(work.splits) > self._splits:
            return None
        self._send(work, padded, batch.token_ids, batch.positions, batch.slots)
        self._graphs[padded].replay()
        return self._logits

    def _send(self, work: HostWork, padded: int, *columns: list[int]) -> None:
        head = np.zeros((COLUMNS, padded), np.int32)
        head[2] = SCRAP_BLOCK * self._cache.block_tokens
        head[:, : len(columns[0])] = columns
        buffer = staged(work.packed(head.ravel()), self._ints.device)
        self._ints[: len(buffer)].copy_(buffer, non_blocking=True)

    @torch.inference_mode()
    def _capture(self, rows: int, pool: Any) -> torch.cuda.CUDAGraph:
        nobody = Step([], [], [], self._cache.block_tokens)
        self._send(plan_gpu(nobody, 1, decodes=rows), rows, [], [], [])
        self._forward(rows)  # compiles what is compiled at a first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._forward(rows)
        return graph

    def _forward(self, rows: int) -> None:
        columns = self._ints[: COLUMNS * rows].long().view(COLUMNS, rows)
        work = work_at(self._ints, COLUMNS * rows, rows, self._splits, 0)
        every_row = torch.arange(rows, device=self._ints.device)
        token_ids, positions, slots = columns.unbind()
        token_ids = known_ids(token_ids, self._chosen)
        logits = self._model.forward(token_ids, positions, slots, self._cache.data, work, every_row)
        self._logits[:rows].copy_(logits)


def most_splits(rows: int, cache: KvCache, context_tokens: int) -> int:
    """Splits that a graph's step may have: those of a full pool, in which every stream's last one
    is cut short. Steps that have more, of streams that share long prefixes, go without a graph."""
    pool_tokens = cache.data.shape[2] * cache.block_tokens
    return min(rows * -(-context_tokens // SPLIT_TOKENS), pool_tokens // SPLIT_TOKENS + rows)


def buffer_ints(rows: int, splits: int, block_tokens: int) -> int:
    """Room for any step of at most `rows` rows and `splits` splits."""
    lists = COLUMNS * rows + rows + 1 + 2 * ITEM
    return lists + splits * (ITEM + -(-SPLIT_TOKENS // block_tokens)) + ITEM


def known_ids(token_ids: Tensor, chosen: Tensor) -> Tensor:
    """[rows] token ids, with `chosen[i]` in place of -1 - i."""
    index = (~token_ids).clamp_(min=0)
    return torch.where(token_ids < 0, chosen[index], token_ids)
