"""A prompt as prefix caches know it: the keys of its KV blocks, which differ in size by device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_runtime.contract import KV_PAGE_TOKENS


@dataclass(frozen=True)
class PromptKeys:
    blocks: Sequence[bytes]
    """Of the full blocks, first block first."""
    block_tokens: int
    """Of the pods' KV cache; a page's 256 tokens are a multiple of it."""
    below: Sequence[bytes] = ()
    """Of the full pages, as tiers below the accelerator know them."""

    @property
    def page_blocks(self) -> int:
        """Blocks of a page."""
        return KV_PAGE_TOKENS // self.block_tokens

    @property
    def pages(self) -> Sequence[bytes]:
        """Of the full pages on the accelerator: each is named by the key of its last block."""
        return self.blocks[self.page_blocks - 1 :: self.page_blocks]

    @property
    def tokens(self) -> int:
        """Of the full blocks."""
        return len(self.blocks) * self.block_tokens
