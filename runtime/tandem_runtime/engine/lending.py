"""Pages of the prefix cache for other pods, read beside the engine's thread, which never waits.

A block that can be found by its key is immutable, and it is forgotten before it is handed out again
(blocks.py). So whoever finds a page's blocks, copies them and then finds the same contents still
named by the same blocks has copied nothing else in between; a copy that was overtaken is dropped.
Nothing is held: lending changes neither what is evicted nor what was promised.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.flight import Runner
from tandem_runtime.kv.layout import Payload


class Lending:
    """For any thread."""

    def __init__(self, pool: BlockPool, runner: Runner, block_tokens: int) -> None:
        self._pool = pool
        self._runner = runner
        self._block_tokens = block_tokens

    def read(self, keys: Sequence[bytes], tokens: bytes) -> Payload | None:
        """Canonical KV of a run of blocks; None where it is not here, or cannot be read now.

        Args:
            keys: prefix keys of the blocks.
            tokens: all their token ids (`prefix.token_bytes`), which are compared.
        """
        size = 4 * self._block_tokens
        ids = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        if not keys or len(ids) != len(keys):
            return None
        contents = self._pool.contents(keys, ids)
        if contents is None:
            return None
        end = len(contents) * self._block_tokens
        payload = self._runner.read_beside(list(contents), 0, end)
        return payload if self._pool.unchanged(contents) else None
