"""Which pods have seen which prefixes. Bounded, pure.

Keys are those of the pods' prefix caches (prefix.py), so tenants and salts stay apart here too.
What is remembered is a guess: a pod may have evicted the blocks meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from tandem_runtime.contract import BLOCK_TOKENS, KV_PAGE_TOKENS

_PAGE_BLOCKS: Final = KV_PAGE_TOKENS // BLOCK_TOKENS
_PODS_OF_A_KEY: Final = 8


class PrefixMemory:
    """Remembers the first page of a prompt block by block, and the rest page by page."""

    def __init__(self, max_keys: int = 200_000) -> None:
        self._max_keys = max_keys
        self._pods: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pods)

    def learn(self, pod_uid: str, keys: Sequence[bytes]) -> None:
        """The pod now holds the prompt whose blocks have these keys, first block first."""
        for n in reversed(_marks(len(keys))):
            key = keys[n - 1]
            pods = self._pods.get(key, ())
            if pod_uid not in pods:
                pods = (*pods, pod_uid)[-_PODS_OF_A_KEY:]
            self._pods[key] = pods
            self._pods.move_to_end(key)
        while len(self._pods) > self._max_keys:
            self._pods.popitem(last=False)

    def held_tokens(self, keys: Sequence[bytes]) -> dict[str, int]:
        """For each pod that has seen a beginning of the prompt, how many tokens of it."""
        held: dict[str, int] = {}
        for n in _marks(len(keys)):
            pods = self._pods.get(keys[n - 1], ())
            for pod_uid in pods:
                held[pod_uid] = n * BLOCK_TOKENS
        return held


def _marks(blocks: int) -> list[int]:
    """Numbers of blocks at which a prefix is remembered, rising."""
    first = list(range(1, min(blocks, _PAGE_BLOCKS) + 1))
    return first + list(range(2 * _PAGE_BLOCKS, blocks + 1, _PAGE_BLOCKS))
