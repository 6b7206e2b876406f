"""Text <-> token ids of one model, from its `TokenizerBundle`."""

from __future__ import annotations

import json
from functools import lru_cache

from tokenizers import Tokenizer as _Tokenizer

from tandem_runtime.protocol import TokenizerBundle


class Tokenizer:
    """Thread-safe and immutable: one for each bundle serves all streams."""

    def __init__(self, bundle: TokenizerBundle) -> None:
        self.bundle = bundle
        self._tokenizer = _Tokenizer.from_str(bundle.tokenizer_json)
        # A prompt is encoded whole: whoever saved the vocabulary may have left limits in it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = _uses_byte_level(json.loads(bundle.tokenizer_json).get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._token_bytes = lru_cache(maxsize=65536)(self._compute_token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens=False` for text that a chat template rendered (it wrote them)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos = self.bundle.bos_token_id
        if add_special_tokens and self.bundle.add_bos and bos is not None:
            return [bos, *ids]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id outside the vocabulary."""
        return self._token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token as logprobs show it."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _compute_token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(_byte_of(char) for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def _uses_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(
        _uses_byte_level(step) for step in decoder.get("decoders", [])
    )


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): bytes([b]) for b in printable}
    return alphabet | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


def _byte_of(char: str) -> bytes:
    return _byte_alphabet().get(char, char.encode())
