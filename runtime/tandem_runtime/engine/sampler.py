"""From logits to tokens: each row as its stream asked for, with log probabilities where wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.engine.batch import SampleRow
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kernels.sampling import noise_keys
from tandem_runtime.protocol import TokenLogprob


def sample(logits: Tensor, rows: list[SampleRow]) -> list[SampledToken | None]:
    """One token for each row; None where the model's output is not finite.

    Args:
        logits: [rows, vocabulary] float32.
        rows: how to choose.
    """
    device = logits.device
    chosen = kernels.sample(
        logits,
        torch.tensor([row.temperature for row in rows], device=device),
        torch.tensor([row.top_p for row in rows], device=device),
        torch.tensor([noise_keys(row.seed, row.position) for row in rows], device=device),
    )
    # One infinity or NaN anywhere in a row makes its maximum one.
    finite = logits.amax(-1).isfinite()
    tokens = [SampledToken(token_id) for token_id in chosen.tolist()]
    wanted = [index for index, row in enumerate(rows) if row.logprobs is not None]
    if wanted:
        index = torch.tensor(wanted, device=device)
        counts = [rows[i].logprobs or 0 for i in wanted]
        for i, token in zip(wanted, _logprobs(logits[index], chosen[index], counts), strict=True):
            tokens[i] = token
    return [token if ok else None for token, ok in zip(tokens, finite.tolist(), strict=True)]


def _logprobs(logits: Tensor, chosen: Tensor, counts: list[int]) -> list[SampledToken]:
    """Each row's chosen token with its log probability and those of its `counts[row]` best."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None]).squeeze(-1).tolist()
    best = logprobs.topk(max(counts))
    return [
        SampledToken(token_id, logprob, tuple(map(TokenLogprob, ids[:count], values[:count])))
        for token_id, logprob, ids, values, count in zip(
            chosen.tolist(), own, best.indices.tolist(), best.values.tolist(), counts, strict=True
        )
    ]
