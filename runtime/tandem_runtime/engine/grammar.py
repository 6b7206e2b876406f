"""What a stream's output must be: a grammar that follows it token by token (llguidance; no torch).

A grammar's state is a function of the output's token ids, so nothing of it moves with a stream: the
pod that goes on compiles the grammar again and replays them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Final

import llguidance

from tandem_runtime.engine.sequence import RequestRefused

_KEPT: Final = 64
"""Compiled grammars: requests mostly repeat those of an application."""


class Grammar:
    """One stream's. Not thread-safe."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._consumed = 0

    def allowed(self, output_ids: Sequence[int]) -> bytes:
        """Which tokens may follow `output_ids`, which only ever grow: a bit for each id, from the
        lowest bit of the first byte on, in whole 32-bit words. After the end: the end tokens."""
        self._matcher.consume_tokens(list(output_ids[self._consumed :]))
        self._consumed = len(output_ids)
        return self._matcher.compute_bitmask()


class Grammars:
    """Compiles for one vocabulary, beside the engine's thread: it may take a second."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = tokenizer_json, vocab_size, list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = Lock()
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    async def follow(self, source: str) -> Grammar | None:
        """A stream's own; None for no grammar. Raises `RequestRefused`."""
        return await asyncio.to_thread(self.compile, source) if source else None

    def compile(self, source: str) -> Grammar:
        """Raises `RequestRefused`."""
        with self._lock:
            return Grammar(self._compiled(source).deep_copy())

    def _compile(self, source: str) -> llguidance.LLMatcher:
        tokenizer_json, vocab_size, eos_token_ids = self._vocabulary
        if not eos_token_ids:
            raise RequestRefused("the model has no end token, so a grammar cannot end its answer")
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids
            )
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise RequestRefused(f"the grammar cannot be compiled: {matcher.get_error().strip()}")
        return matcher
