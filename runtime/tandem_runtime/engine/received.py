"""What another pod may send for a stream that is received here. Pure; raises ValueError."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from tandem_runtime.engine.sequence import SampledToken, Sequence


def check_payload(
    sequence: Sequence, start_token: int, payload_bytes: int, *, token_bytes: int, block_tokens: int
) -> int:
    """KV continues what is here, without a gap, within the blocks that were granted.

    Returns:
        The token after the payload's last one.
    """
    tokens, rest = divmod(payload_bytes, token_bytes)
    end_token = start_token + tokens
    room = min(len(sequence.block_ids) * block_tokens, sequence.known_tokens)
    if rest or tokens == 0:
        raise ValueError(
            f"{sequence.request_id}: a KV payload of {payload_bytes} bytes is no whole "
            f"number of tokens of {token_bytes} bytes"
        )
    if start_token != sequence.computed_tokens or end_token > room:
        raise ValueError(
            f"{sequence.request_id}: KV of tokens [{start_token}, {end_token}) came, but "
            f"[{sequence.computed_tokens}, {room}) is granted and missing"
        )
    return end_token


def check_extension(sequence: Sequence, token_ids: Ids[int], vocab_size: int) -> None:
    """Tokens that the pod which still decodes the stream has chosen."""
    if len(token_ids) > sequence.headroom_tokens:
        raise ValueError(
            f"{sequence.request_id}: {len(token_ids)} more tokens came, and there is room for "
            f"{sequence.headroom_tokens}"
        )
    if any(not 0 <= token_id < vocab_size for token_id in token_ids):
        raise ValueError(f"{sequence.request_id}: a token is not in 0..{vocab_size - 1}")


def check_resume(sequence: Sequence) -> None:
    """A stream goes on where the other pod stopped: by computing its last known token at least."""
    if not sequence.granted or sequence.computed_tokens >= sequence.known_tokens:
        raise ValueError(f"{sequence.request_id}: no token is left to compute, or none was granted")


def check_first(sequence: Sequence, first: SampledToken, vocab_size: int) -> None:
    """The token that the prefill pod sampled when all KV had been sent."""
    if sequence.computed_tokens < sequence.known_tokens:
        raise ValueError(
            f"{sequence.request_id}: KV of {sequence.known_tokens} tokens is needed to decode, and "
            f"{sequence.computed_tokens} are here"
        )
    if not 0 <= first.token_id < vocab_size:
        raise ValueError(
            f"{sequence.request_id}: first token {first.token_id} is not in 0..{vocab_size - 1}"
        )
