"""Which pods have seen which prefixes. Bounded, pure.

Keys are those of the pods' prefix caches (prefix.py), so tenants and salts stay apart here too.
What is remembered is a guess: a pod may have evicted the blocks meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from tandem_runtime.gateway.prompt_keys import PromptKeys

_PODS_OF_A_KEY: Final = 8


class PrefixMemory:
    """Remembers the first page of a prompt block by block, and the rest page by page."""

    def __init__(self, max_keys: int = 200_000) -> None:
        self._max_keys = max_keys
        self._pods: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pods)

    def learn(self, pod_uid: str, keys: PromptKeys) -> None:
        """The pod now holds the prompt whose blocks have these keys, first block first."""
        for n in reversed(_marks(keys)):
            key = keys.blocks[n - 1]
            pods = self._pods.get(key, ())
            if pod_uid not in pods:
                pods = (*pods, pod_uid)[-_PODS_OF_A_KEY:]
            self._pods[key] = pods
            self._pods.move_to_end(key)
        while len(self._pods) > self._max_keys:
            self._pods.popitem(last=False)

    def held_tokens(self, keys: PromptKeys) -> dict[str, int]:
        """For each pod that has seen a beginning of the prompt, how many tokens of it."""
        held: dict[str, int] = {}
        for n in _marks(keys):
            pods = self._pods.get(keys.blocks[n - 1], ())
            for pod_uid in pods:
                held[pod_uid] = n * keys.block_tokens
        return held


def _marks(keys: PromptKeys) -> list[int]:
    """Numbers of blocks at which a prefix is remembered, rising."""
    blocks, page = len(keys.blocks), keys.page_blocks
    return [*range(1, min(blocks, page) + 1), *range(2 * page, blocks + 1, page)]
