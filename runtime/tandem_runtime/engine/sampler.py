"""From logits to tokens: each row as its stream asked for, with log probabilities where wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.engine.batch import SampleRow
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kernels.attention_plan import to_device
from tandem_runtime.kernels.sampling import noise_keys
from tandem_runtime.protocol import TokenLogprob


@dataclass(frozen=True)
class Choice:
    """Tokens that are being chosen. What is on the way to the host may be read once it is there:
    on a GPU when an event that was recorded after `choose` has come."""

    ids: Tensor
    """[rows] int64 on the device."""
    host_ids: Tensor
    finite: Tensor
    """[rows] bool on the host."""
    counts: dict[int, int]
    """How many log probabilities each row wants that wants its own."""
    logprobs: tuple[Tensor, ...]
    """Of these rows, on the host: each token's own, and ids and values of the best."""

    def tokens(self) -> list[SampledToken | None]:
        """One for each row; None where the model's output is not finite."""
        tokens = [SampledToken(token_id) for token_id in self.host_ids.tolist()]
        columns = [column.tolist() for column in self.logprobs]
        for (row, count), own, ids, values in zip(self.counts.items(), *columns, strict=True):
            best = tuple(map(TokenLogprob, ids[:count], values[:count]))
            tokens[row] = SampledToken(tokens[row].token_id, own, best)
        finite = self.finite.tolist()
        return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def sample(logits: Tensor, rows: list[SampleRow]) -> list[SampledToken | None]:
    """`choose`, and wait."""
    choice = choose(logits, rows)
    if logits.device.type == "cuda":
        torch.cuda.synchronize()
    return choice.tokens()


def choose(logits: Tensor, rows: list[SampleRow]) -> Choice:
    """One token for each row, without waiting for the device.

    Args:
        logits: [rows, vocabulary] float32.
        rows: how to choose.
    """

    def on_device(values: list[float] | list[int] | list[tuple[int, int]], kind: type) -> Tensor:
        return to_device(np.array(values, kind), logits.device)

    chosen = kernels.sample(
        logits,
        on_device([row.temperature for row in rows], np.float32),
        on_device([row.top_p for row in rows], np.float32),
        on_device([noise_keys(row.seed, row.position) for row in rows], np.int64),
    )
    # One infinity or NaN anywhere in a row makes its maximum one.
    finite = logits.amax(-1).isfinite()
    counts = {i: row.logprobs for i, row in enumerate(rows) if row.logprobs is not None}
    logprobs: tuple[Tensor, ...] = ()
    if counts:
        index = on_device(list(counts), np.int64)
        logprobs = _logprobs(logits[index], chosen[index], max(counts.values()))
    return Choice(
        ids=chosen,
        host_ids=_to_host(chosen),
        finite=_to_host(finite),
        counts=counts,
        logprobs=tuple(map(_to_host, logprobs)),
    )


def _logprobs(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's log probability of its chosen token, and ids and values of its best."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None]).squeeze(-1)
    best = logprobs.topk(count)
    return own, best.indices, best.values


def _to_host(tensor: Tensor) -> Tensor:
    """Into pinned memory, without waiting."""
    return tensor.to("cpu", non_blocking=True)
