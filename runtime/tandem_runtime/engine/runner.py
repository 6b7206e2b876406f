"""Turns a batch of index lists into tensors, runs the model, samples.

One host synchronisation a step on a GPU: the copy of the sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.blocks import SCRAP_BLOCK
from tandem_runtime.engine.flight import Payload
from tandem_runtime.engine.sampler import sample
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.model.decoder import Decoder

MIN_ROWS = 4
"""A product of fewer rows takes another path in CPU libraries and rounds otherwise."""


class TorchRunner:
    """A model and its cache on one device. Implements `flight.Runner`."""

    def __init__(self, model: Decoder, cache: KvCache, *, overlaps: bool = False) -> None:
        self.overlaps = overlaps
        self._model = model
        self._cache = cache
        self._device = cache.data.device
        self._chosen: list[int] = []
        """By the newest step."""
        self._min_rows = MIN_ROWS if self._device.type == "cpu" else 1

    @torch.inference_mode()
    def launch(self, batch: Batch) -> list[SampledToken | None]:
        """One step; see `flight.Runner`."""
        config, block_tokens = self._model.config, self._cache.block_tokens
        self._cache.begin(batch.slots)
        padding = [0] * (self._min_rows - batch.rows)
        work = kernels.plan_attention(
            Step(batch.query_tokens, batch.context_tokens, batch.block_tables, block_tokens),
            heads=config.heads,
            kv_heads=config.kv_heads,
            device=self._device,
            dtype=self._cache.data.dtype,
        )
        token_ids = [i if i >= 0 else self._chosen[-1 - i] for i in batch.token_ids]
        logits = self._model.forward(
            self._tensor(token_ids + padding),
            self._tensor(batch.positions + padding),
            self._tensor(batch.slots + [SCRAP_BLOCK * block_tokens] * len(padding)),
            self._cache.layers,
            work,
            self._tensor(self._logit_rows(batch.samples)),
        )
        tokens = sample(logits[: len(batch.samples)], batch.samples) if batch.samples else []
        self._chosen = [token.token_id if token else 0 for token in tokens]
        return tokens

    def collect(self, launched: list[SampledToken | None]) -> list[SampledToken | None]:
        """See `flight.Runner`."""
        return launched

    def _logit_rows(self, samples: list[SampleRow]) -> list[int]:
        """The head multiplies these rows alone, so they are padded for themselves."""
        rows = [sample.row for sample in samples]
        return rows + [0] * (self._min_rows - len(rows)) if rows else []

    @torch.inference_mode()
    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """Canonical bytes of tokens [start, end)."""
        return self._cache.read(block_ids, start, end)

    @torch.inference_mode()
    def write_kv(self, block_ids: list[int], start: int, payload: Payload) -> None:
        """Store canonical bytes from token `start` on."""
        self._cache.write(block_ids, start, payload)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)
