"""Decode steps on the CPU, replayed: what graphs.py is on a GPU.

Python takes some 15 us to call an operator, which computes a few rows in less. A step's layers call
the same operators as any other's with as many rows: they are recorded once, over memory that stays,
into which each step puts its rows, its slots and its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.graphs import known_ids
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.kernels.cpu_attention import CpuWork, plan_cpu
from tandem_runtime.kernels.team import Recording
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.model.decoder import Decoder, Rows


@dataclass
class _Recorded:
    """A step of some number of rows."""

    rows: Rows
    slots: Tensor
    work: CpuWork
    layers: Recording | None = None
    """None: not recorded yet."""
    x: Tensor | None = None
    """What the last one leaves."""

    def fill(self, rows: Rows, slots: list[int], work: CpuWork) -> None:
        self.rows.residual.copy_(rows.residual)
        self.rows.cos.copy_(rows.cos)
        self.rows.sin.copy_(rows.sin)
        self.slots.copy_(torch.tensor(slots))
        self.work.pieces[:] = work.pieces
        self.work.tables[: len(work.tables)] = work.tables


class RecordedSteps:
    """Recorded at the first step of each number of rows.

    Args:
        model: what computes; `recordable`.
        cache: where KV is, in the model's dtype.
        chosen: [max_running] int64, the ids that the newest step chose.
    """

    def __init__(self, model: Decoder, cache: KvCache, chosen: Tensor) -> None:
        self._model = model
        self._cache = cache
        self._chosen = chosen
        self._steps: dict[int, _Recorded] = {}

    def replay(self, batch: Batch, step: Step) -> Tensor | None:
        """Logits of a step's rows; None if it is not one of decodes alone."""
        count = len(step.query_tokens)
        if step.decodes < count or len(batch.samples) < count:
            return None
        token_ids = torch.tensor(batch.token_ids)
        if min(batch.token_ids) < 0:
            token_ids = known_ids(token_ids, self._chosen)
        rows = self._model.rows(token_ids, torch.tensor(batch.positions))
        recorded = self._steps.get(count)
        if recorded is None:
            recorded = self._steps[count] = self._room(count, rows)
        recorded.fill(rows, batch.slots, plan_cpu(step))
        if recorded.layers is None:
            recorded.layers, recorded.x = self._record(recorded)
        else:
            recorded.layers.replay()
        assert recorded.x is not None
        return self._model.logits(self._model.normed(recorded.x, recorded.rows))

    def _room(self, count: int, rows: Rows) -> _Recorded:
        blocks = count * -(-self._model.context_tokens // self._cache.block_tokens)
        work = CpuWork(np.zeros((count, 4), np.int32), np.zeros(blocks, np.int32))
        own = Rows(*(torch.empty_like(t) for t in (rows.residual, rows.cos, rows.sin)))
        return _Recorded(own, torch.empty(count, dtype=torch.int64), work)

    def _record(self, recorded: _Recorded) -> tuple[Recording, Tensor]:
        recording, x = Recording(), None
        for index, cache in enumerate(self._cache.data):
            with recording.layer(index):
                x = self._model.layer(index, x, recorded.rows, recorded.slots, cache, recorded.work)
        assert x is not None
        return recording, x
