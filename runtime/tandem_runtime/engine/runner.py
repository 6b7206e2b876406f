"""Turns a batch of index lists into tensors, runs the model, samples. The engine's only torch.

One host synchronisation a step on a GPU: the copy of the sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.blocks import SCRAP_BLOCK
from tandem_runtime.engine.engine import Payload
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.kernels.sampling import noise_keys
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.model.llama import Llama
from tandem_runtime.protocol import TokenLogprob

MIN_ROWS = 4
"""A float32 product of fewer rows takes another path in CPU libraries and rounds otherwise."""


class TorchRunner:
    """A model and its cache on one device. Implements `engine.Runner`."""

    def __init__(self, model: Llama, cache: KvCache) -> None:
        self._model = model
        self._cache = cache
        self._device = cache.data.device

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[SampledToken]:
        """One step; see `engine.Runner`."""
        config, block_tokens = self._model.config, self._cache.block_tokens
        padding = [0] * max(MIN_ROWS - batch.rows, 0)
        work = kernels.plan_attention(
            Step(batch.query_tokens, batch.context_tokens, batch.block_tables, block_tokens),
            heads=config.heads,
            kv_heads=config.kv_heads,
            device=self._device,
        )
        logits = self._model.forward(
            self._tensor(batch.token_ids + padding),
            self._tensor(batch.positions + padding),
            self._tensor(batch.slots + [SCRAP_BLOCK * block_tokens] * len(padding)),
            self._cache.data,
            work,
            # The head multiplies these rows alone: they are padded for themselves.
            self._tensor(_logit_rows(batch.samples)),
        )[: len(batch.samples)]
        return self._sample(logits, batch.samples)

    def _sample(self, logits: Tensor, rows: list[SampleRow]) -> list[SampledToken]:
        if not rows:
            return []
        chosen = kernels.sample(
            logits,
            torch.tensor([row.temperature for row in rows], device=self._device),
            torch.tensor([row.top_p for row in rows], device=self._device),
            self._tensor([noise_keys(row.seed, row.position) for row in rows]),
        )
        wanted = [index for index, row in enumerate(rows) if row.logprobs is not None]
        tokens = [SampledToken(token_id) for token_id in chosen.tolist()]
        if wanted:
            logprobs = logits[self._tensor(wanted)].log_softmax(-1)
            for index, row in zip(wanted, logprobs, strict=True):
                tokens[index] = _with_logprobs(tokens[index], row, rows[index].logprobs or 0)
        return tokens

    @torch.inference_mode()
    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """Canonical bytes of tokens [start, end)."""
        return self._cache.read(block_ids, start, end)

    @torch.inference_mode()
    def write_kv(self, block_ids: list[int], start: int, payload: Payload) -> None:
        """Store canonical bytes from token `start` on."""
        self._cache.write(block_ids, start, payload)

    def _tensor(self, values: list[int] | list[tuple[int, int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)


def _logit_rows(samples: list[SampleRow]) -> list[int]:
    rows = [sample.row for sample in samples]
    return rows + [0] * max(MIN_ROWS - len(rows), 0) if rows else []


def _with_logprobs(token: SampledToken, logprobs: Tensor, top: int) -> SampledToken:
    best = logprobs.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return SampledToken(
        token.token_id,
        float(logprobs[token.token_id]),
        tuple(TokenLogprob(token_id, logprob) for token_id, logprob in pairs),
    )
