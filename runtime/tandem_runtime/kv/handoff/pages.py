"""Which tokens' KV goes into which frame. Pure.

Frames end at multiples of a page and at the stream's last token, so peers cut alike whatever the
chunks in which the prompt is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from tandem_runtime.engine.sequence import Span


def whole_pages(start: int, end: int, known_tokens: int, page_tokens: int) -> Iterator[Span]:
    """The frames that can be cut from tokens [start, end) of a stream of `known_tokens`."""
    while start < end:
        stop = min((start // page_tokens + 1) * page_tokens, known_tokens)
        if stop > end:
            return
        yield Span(start, stop)
        start = stop


def credit(received_tokens: int, window_pages: int, known_tokens: int, page_tokens: int) -> int:
    """Tokens that may be on their way when so many have been received."""
    return min((received_tokens // page_tokens + window_pages) * page_tokens, known_tokens)


def checksum(payload: memoryview) -> int:
    """xxh3-64: against broken memory and wires, not against an attacker."""
    return xxhash.xxh3_64_intdigest(payload)
