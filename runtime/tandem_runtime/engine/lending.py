"""Pages of the prefix cache for other pods and the cache tiers, read beside the engine's thread,
which never waits.

A block that can be found by its key is immutable, and it is forgotten before it is handed out again
(blocks.py). So whoever finds a page's blocks, copies them, and then finds that none was forgotten
meanwhile, has copied nothing else; a copy that was overtaken is dropped.
Nothing is held: lending changes neither what is evicted nor what was promised.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.flight import Runner
from tandem_runtime.kv.tiers.contract import Lent


class Lending:
    """For any thread."""

    def __init__(self, pool: BlockPool, runner: Runner, block_tokens: int) -> None:
        self._pool = pool
        self._runner = runner
        self._block_tokens = block_tokens

    @property
    def possible(self) -> bool:
        """Whether `read` ever gives anything."""
        return self._runner.reads_beside

    def read(self, keys: Sequence[bytes], tokens: bytes) -> Lent | None:
        """Canonical KV of a run of blocks; None where it is not here, or cannot be read now.

        Args:
            keys: prefix keys of the blocks.
            tokens: all their token ids (`prefix.token_bytes`), which are compared.
        """
        size = 4 * self._block_tokens
        ids = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        if not keys or len(ids) != len(keys):
            return None
        found = self._pool.find(keys, ids)
        if found is None:
            return None
        decoded = self._pool.decoded(found)
        payload = self._runner.read_beside(list(found), 0, len(found) * self._block_tokens)
        if payload is None or not self._pool.unchanged(found):
            return None
        return Lent(payload, decoded)
