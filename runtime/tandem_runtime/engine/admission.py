"""Which requests an engine can never serve. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem_runtime.engine.sequence import Request, RequestRefused


@dataclass(frozen=True)
class Capacity:
    """What bounds a stream."""

    vocab_size: int
    context_tokens: int
    kv_tokens: int
    """Tokens that the whole pool holds."""


def check_request(request: Request, capacity: Capacity) -> None:
    """Raises `RequestRefused`."""
    prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    if prompt == 0:
        raise RequestRefused("the prompt is empty: give at least one token")
    if max_tokens < 1:
        raise RequestRefused(f"max_tokens is {max_tokens}: ask for at least 1")
    for token_id in (*_extremes(request.prompt_ids), *_extremes(request.output_ids)):
        if not 0 <= token_id < capacity.vocab_size:
            raise RequestRefused(
                f"token id {token_id} is not in the vocabulary, 0..{capacity.vocab_size - 1}"
            )
    for token_id, _ in request.sampling.logit_bias:
        if not 0 <= token_id < capacity.vocab_size:
            raise RequestRefused(
                f"logit_bias names token id {token_id}, not in 0..{capacity.vocab_size - 1}"
            )
    if request.sampling.grammar and request.grammar is None:
        raise RequestRefused("the grammar is not compiled")
    if prompt + max_tokens > capacity.context_tokens:
        raise RequestRefused(
            f"the prompt has {prompt} tokens and max_tokens is {max_tokens}: together "
            f"{prompt + max_tokens}, more than the context of {capacity.context_tokens}"
        )
    # The last token's KV is never needed.
    if prompt + max_tokens - 1 > capacity.kv_tokens:
        raise RequestRefused(
            f"the prompt has {prompt} tokens and max_tokens is {max_tokens}: together more "
            f"than the {capacity.kv_tokens} tokens that this pod's KV cache holds"
        )


def _extremes(token_ids: Sequence[int]) -> tuple[int, ...]:
    """The least and the greatest, if there are any."""
    if not token_ids:
        return ()
    if isinstance(token_ids, array):
        ids = np.frombuffer(token_ids, np.uint32)
        return int(ids.min()), int(ids.max())
    return min(token_ids), max(token_ids)
