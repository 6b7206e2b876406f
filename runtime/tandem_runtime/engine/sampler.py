"""From logits to tokens: each row as its stream asked for, with log probabilities where wanted.

In vLLM's order: bias and forbidden tokens, penalties, grammar; then temperature, top-k, top-p and
min-p in `kernels.sample`. What depends on earlier tokens is counted from their ids anew in each
step: no state, so a stream that moves or is resumed goes on with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.engine.batch import SampleRow
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kernels.attention_plan import to_device
from tandem_runtime.kernels.sampling import noise_keys
from tandem_runtime.protocol import Sampling, TokenLogprob


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
        logits: [rows, vocabulary] float32; changed in place where rows are `adjusted`.
        rows: how to choose.
    """
    # One infinity or NaN anywhere in a row makes its maximum one.
    finite = logits.amax(-1).isfinite()
    counts = {
        i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None
    }
    wanted = _on(logits, list(counts), np.int64)
    raw = logits[wanted].log_softmax(-1) if counts else None
    adjusted = [index for index, row in enumerate(rows) if row.adjusted]
    if adjusted:
        adjust(logits, rows, adjusted)
    chosen = kernels.sample(
        logits,
        _on(logits, [_controls(row.sampling) for row in rows], np.float32),
        _on(logits, [noise_keys(row.sampling.seed, row.position) for row in rows], np.int64),
    )
    logprobs = () if raw is None else _named(raw, chosen[wanted], max(counts.values()))
    return Choice(
        ids=chosen,
        host_ids=_to_host(chosen),
        finite=_to_host(finite),
        counts=counts,
        logprobs=tuple(map(_to_host, logprobs)),
    )


def _on(logits: Tensor, values: Sequence[object], kind: type) -> Tensor:
    return to_device(np.array(values, kind), logits.device)


def _controls(sampling: Sampling) -> tuple[float, float, float, float]:
    reach = -math.log(sampling.min_p) if sampling.min_p else math.inf
    return sampling.temperature, float(sampling.top_k), sampling.top_p, reach


def _named(logprobs: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's log probability of its chosen token, and ids and values of its best."""
    own = logprobs.gather(-1, chosen[:, None]).squeeze(-1)
    best = logprobs.topk(count)
    return own, best.indices, best.values


def _to_host(tensor: Tensor) -> Tensor:
    """Into pinned memory, without waiting."""
    return tensor.to("cpu", non_blocking=True)


# -- changes of the logits -------------------------------------------------------------------------
def adjust(logits: Tensor, rows: list[SampleRow], adjusted: list[int]) -> None:
    """Changes the logits of the rows `adjusted` in place."""
    _add(logits, rows, adjusted)
    penalised = [index for index in adjusted if rows[index].sampling.penalises]
    if penalised:
        _penalise(logits, rows, penalised)
    bound = [(index, grammar) for index in adjusted if (grammar := rows[index].grammar) is not None]
    if bound:
        masks = [
            grammar.allowed(rows[index].token_ids[rows[index].prompt_tokens : rows[index].position])
            for index, grammar in bound
        ]
        indices = _on(logits, [index for index, _ in bound], np.int64)
        logits[indices] = logits[indices].masked_fill_(_forbidden(masks, logits), -math.inf)


def _add(logits: Tensor, rows: list[SampleRow], adjusted: list[int]) -> None:
    """Bias, and minus infinity for tokens that would end an answer shorter than `min_tokens`."""
    added = []
    for index in adjusted:
        row, sampling = rows[index], rows[index].sampling
        added += [(index, token_id, bias) for token_id, bias in sampling.logit_bias]
        if row.position - row.prompt_tokens < sampling.min_tokens:
            added += [
                (index, token_id, -math.inf)
                for token_id in set(sampling.stop_token_ids)
                if token_id < logits.shape[-1]
            ]
    if added:
        at = _on(logits, [place[:2] for place in added], np.int64).unbind(1)
        bias = _on(logits, [place[2] for place in added], np.float32)
        logits.index_put_(at, bias, accumulate=True)


def _penalise(logits: Tensor, rows: list[SampleRow], penalised: list[int]) -> None:
    """vLLM's repetition, frequency and presence penalties. Work and memory traffic are those of the
    ids, but for one clearing of counts; a token that is there twice is written twice, alike."""
    chosen = [rows[index] for index in penalised]
    lengths = [row.position for row in chosen]
    places = np.stack(
        [
            np.arange(len(chosen)).repeat(lengths),
            np.repeat(penalised, lengths),
            np.concatenate([row.token_ids[: row.position] for row in chosen]),
            np.concatenate([np.arange(row.position) >= row.prompt_tokens for row in chosen]),
        ]
    )
    own, row, token, generated = to_device(places, logits.device)
    counts = torch.zeros(len(chosen), logits.shape[-1], device=logits.device)
    counts.index_put_((own, token), generated.float(), accumulate=True)
    count = counts[own, token]
    asked = [row.sampling for row in chosen]
    penalties = [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in asked]
    repetition, frequency, presence = _on(logits, penalties, np.float32)[own].unbind(1)
    x = logits[row, token]
    x = torch.where(x > 0, x / repetition, x * repetition)
    logits[row, token] = x - frequency * count - presence * (count > 0)


def _forbidden(masks: list[bytes], logits: Tensor) -> Tensor:
    """[n, vocabulary] bool, the inverse of n bit masks (`Grammar.allowed`)."""
    words = to_device(np.frombuffer(bytearray(b"".join(masks)), np.int32), logits.device)
    bits = words.view(len(masks), -1, 1) >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).view(len(masks), -1)[:, : logits.shape[-1]] == 0
