"""Token ids -> text, piece by piece, without ever taking a character back.

A token may end inside a UTF-8 character: its text is held until the character is whole. Invariant:
all pieces and the last `flush()` together are what decoding all ids at once would have given. (One
exception: where a SentencePiece model emits bytes that are no UTF-8, decoding all at once would
also spoil whole characters just before them; they are already out and stay.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tandem_runtime.frontend.tokenizer import Tokenizer

_HALF: Final = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS: Final = 5
"""Prompt tokens decoded in front of the first piece: a leading space depends on what precedes."""
_HELD_TOKENS: Final = 64
"""Bytes that never become a character are given up after so many tokens."""


class Detokenizer:
    """One stream's decoder. The window idea is text-generation-inference's."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._context(self._visible(prompt_ids[-_CONTEXT_TOKENS - 3 :]))
        """Ids whose text is out, then ids whose text is held."""
        self._known = len(self._window)
        self._known_text = tokenizer.decode(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids make certain; may be empty."""
        # One by one: what is out after a number of ids does not depend on how they came, so that
        # another gateway can tell from the number what the client has.
        return "".join(self._extend(token_id) for token_id in self._visible(token_ids))

    def _extend(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        held = len(self._window) - self._known
        if text.endswith(_HALF) and held <= _HELD_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The text still held; a half character comes out as U+FFFD."""
        if self._known == len(self._window):
            return ""
        return self._advance(self._tokenizer.decode(self._window))

    def _context(self, ids: list[int]) -> list[int]:
        # Cut inside a character, its lone bytes would spoil the decoding of those after it.
        starts = range(max(0, len(ids) - _CONTEXT_TOKENS), -1, -1)
        whole = (s for s in starts if not self._tokenizer.decode(ids[s:]).startswith(_HALF))
        return ids[next(whole, 0) :]

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        # Special tokens have no text, and as the window's only tokens they would hide from the
        # decoder that the next one does not start the text.
        special = self._tokenizer.special_ids
        return [i for i in token_ids if i not in special]

    def _advance(self, text: str) -> str:
        piece = text[len(self._known_text) :]
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._known_text = self._tokenizer.decode(self._window)
        return piece
