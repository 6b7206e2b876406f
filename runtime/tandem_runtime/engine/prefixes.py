"""Which of a sequence's blocks others may share: the prefix cache, as sequences see it."""

from __future__ import annotations

from tandem_runtime.context_keys import ContextKeys
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.sequence import Sequence
from tandem_runtime.prefix import extend_keys, token_bytes, token_view
from tandem_runtime.protocol import Named


class Prefixes:
    """Full blocks of the pool by what they hold; none where caching is off."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, caching: bool) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._caching = caching
        self._contexts = ContextKeys()

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's first known tokens. Never that of the last one, which is
        always computed: its logits give the next one."""
        return self.match_upto(sequence, sequence.known_tokens - 1)

    def match_upto(self, sequence: Sequence, upto_tokens: int) -> list[int]:
        """Cached blocks that hold the sequence's first tokens, at most `upto_tokens` of them."""
        if not self._caching:
            return []
        self._extend_keys(sequence)
        keys = sequence.keys[: upto_tokens // self._block_tokens]
        # Lazily: a long prompt that waits is matched again in each step.
        return self._pool.match(keys, (self._tokens(sequence, i) for i in range(len(keys))))

    def look(
        self, root: bytes, tokens: memoryview, begins: Named | None, page_tokens: int
    ) -> tuple[list[bytes], list[bytes], int]:
        """From any thread: keys of a prompt's full blocks, and of its full pages, and how many of
        its first tokens the pool probably holds.

        Args:
            root: of its keys.
            tokens: `token_view` of it.
            begins: the named context that it begins with.
            page_tokens: of a page.
        """
        if not self._caching:
            (pages,) = self._contexts.keys(root, begins, (page_tokens,), tokens)
            return [], pages, 0
        keys, pages = self._contexts.keys(root, begins, (self._block_tokens, page_tokens), tokens)
        return keys, pages, self._pool.present(keys) * self._block_tokens

    def register(self, sequence: Sequence, *, decoded: bool = False) -> None:
        """Offer the sequence's newly full blocks to others; `decoded`: pages that decode steps
        computed were loaded into them."""
        if not self._caching:
            return
        self._extend_keys(sequence)
        full_blocks = sequence.computed_tokens // self._block_tokens
        for i in range(sequence.registered_blocks, full_blocks):
            key = sequence.keys[i]
            generated = (i + 1) * self._block_tokens > sequence.asked_tokens
            block, tokens = sequence.block_ids[i], self._tokens(sequence, i)
            self._pool.register(block, key, tokens, decoded=decoded or generated)
            ends_page = (i + 1) * self._block_tokens % KV_PAGE_TOKENS == 0
            if ends_page and self._pool.present([key]):
                self._pool.pages.gained(key)
        sequence.registered_blocks = max(sequence.registered_blocks, full_blocks)

    def _extend_keys(self, sequence: Sequence) -> None:
        begins, root = sequence.request.begins, sequence.root
        if begins is not None and not sequence.keys:
            tokens = token_view(sequence.token_ids[:])
            (sequence.keys,) = self._contexts.keys(root, begins, (self._block_tokens,), tokens)
        extend_keys(sequence.keys, root, sequence.token_ids, self._block_tokens)

    def _tokens(self, sequence: Sequence, index: int) -> bytes:
        start = index * self._block_tokens
        return token_bytes(sequence.token_ids[start : start + self._block_tokens])
