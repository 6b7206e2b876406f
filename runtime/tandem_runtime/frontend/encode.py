"""Tokenising without holding up other streams."""

from __future__ import annotations

import asyncio
from typing import Final

from tandem_runtime.frontend.tokenizer import Tokenizer

_LONG_CHARS: Final = 20_000
"""About 5 ms of tokenising; handing work to a thread costs about 0.1 ms."""


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Long texts are encoded in a thread: `tokenizers` lets go of the interpreter's lock."""
    if len(text) < _LONG_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
