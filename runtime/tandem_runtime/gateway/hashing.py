"""The keys by which pods know a prompt's KV, as a gateway computes them for each request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from tandem_runtime.context_keys import ContextKeys
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.gateway.prompt_keys import PromptKeys
from tandem_runtime.prefix import root_key
from tandem_runtime.protocol import GenerateRequest, TokenizerBundle

LONG_TOKENS: Final = 50_000
"""More are hashed in a thread: it takes more than 5 ms."""


class PromptHasher:
    """Remembers the keys of named contexts, whose tokens it takes the front end's word for: wrong
    keys would send a prompt to a pod that does not know it, and no more.

    Args:
        secret: the namespace's, which is in every root.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._contexts = ContextKeys()

    async def keys(self, bundle: TokenizerBundle, request: GenerateRequest) -> PromptKeys:
        """Of the request's prompt."""
        root, ids = self._root(bundle, request), request.prompt_ids
        begins = request.begins
        known_tokens = begins.tokens if begins and self._contexts.knows(root, begins) else 0
        if len(ids) - known_tokens > LONG_TOKENS:
            return await asyncio.to_thread(self.of, bundle, request, ids)
        return self.of(bundle, request, ids)

    def of(
        self, bundle: TokenizerBundle, request: GenerateRequest, ids: Sequence[int]
    ) -> PromptKeys:
        """Of ids that begin with the request's prompt."""
        root = self._root(bundle, request)
        sizes = (bundle.block_tokens, KV_PAGE_TOKENS)
        blocks, below = self._contexts.keys_of_ids(root, request.begins, sizes, ids)
        return PromptKeys(blocks, bundle.block_tokens, below)

    def _root(self, bundle: TokenizerBundle, request: GenerateRequest) -> bytes:
        layout_hash = bytes.fromhex(bundle.cache_root)
        return root_key(layout_hash, self._secret, request.tenant, request.cache_salt)
