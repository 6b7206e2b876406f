"""The pool of KV blocks: who holds which, what they contain, and which to reuse first.

Every block is in exactly one of four places:

- *held*: at least one sequence refers to it (`_references` > 0);
- *cached*: nobody refers to it, its content is complete and findable by key; least recently used
  first, it is what allocation takes when nothing is blank;
- *kept*: the same, but pinned: taken only when there is nothing else, for a stream that runs;
- *blank*: nobody refers to it and nothing in it is of use.

Block 0 is *scrap*: kernels write padding rows there; it is never handed out.
A registered block is immutable: it was full when it was registered.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final

from tandem_runtime.engine.page_log import PageLog

SCRAP_BLOCK: Final = 0


class BlockPool:
    """Reference counts, prefix index and eviction order of `block_count` blocks."""

    def __init__(self, block_count: int) -> None:
        if block_count < 2:
            raise ValueError(
                f"a pool of {block_count} blocks holds nothing: block 0 is scrap, give at least 2"
            )
        self.pages = PageLog()
        """What the prefix cache holds, as changes of whole pages. For any thread."""
        self._references = [0] * block_count
        # No object for each block: a garbage collection would hold up a step to look at them.
        self._key: list[bytes | None] = [None] * block_count
        """Of registered blocks."""
        self._tokens: list[bytes | None] = [None] * block_count
        """Their token ids, which a hit compares."""
        self._decoded = bytearray(block_count)
        """Whether decode steps computed some of it."""
        self._forgotten = [0] * block_count
        """How often each was."""
        self._by_key: dict[bytes, int] = {}
        self._blank = list(range(block_count - 1, SCRAP_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._pins: Counter[bytes] = Counter()
        """By key, whether the pool has the block or not."""

    @property
    def total_blocks(self) -> int:
        """Blocks that can be handed out."""
        return len(self._references) - 1

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now; cached ones are among them."""
        return len(self._blank) + self.cached_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody holds and a prefix may still hit."""
        return len(self._cached) + len(self._kept)

    @property
    def held_blocks(self) -> int:
        """Blocks that sequences refer to; a shared one counts once."""
        return self.total_blocks - self.free_blocks

    def match(self, keys: Sequence[bytes], tokens: Iterable[bytes]) -> list[int]:
        """The longest run of leading blocks that are in the pool. Changes nothing.

        Args:
            keys: prefix keys of successive full blocks.
            tokens: their token ids (`prefix.token_bytes`), compared so that a hash collision
                never gives one stream another's content.
        """
        found = []
        for key, block_tokens in zip(keys, tokens, strict=True):
            block_id = self._by_key.get(key)
            if block_id is None:
                break
            if self._tokens[block_id] != block_tokens:
                break
            found.append(block_id)
        return found

    def find(self, keys: Sequence[bytes], tokens: Iterable[bytes]) -> dict[int, int] | None:
        """The same of all these blocks, for any thread; None if one is not here.

        What is in them stays as it is for as long as `unchanged` says so of the answer: by block,
        how often it was forgotten until now.
        """
        found = {}
        for key, block_tokens in zip(keys, tokens, strict=True):
            block_id = self._by_key.get(key)
            if block_id is None:
                return None
            # First the count: the engine's thread may give the block to others meanwhile.
            found[block_id] = self._forgotten[block_id]
            if self._key[block_id] != key or self._tokens[block_id] != block_tokens:
                return None
        return found

    def unchanged(self, found: dict[int, int]) -> bool:
        """Whether none of these blocks has been forgotten since `find` was called."""
        return all(self._forgotten[block_id] == count for block_id, count in found.items())

    def decoded(self, block_ids: Iterable[int]) -> bool:
        """Whether decode steps computed some of these registered blocks."""
        return any(self._decoded[block_id] for block_id in block_ids)

    def unheld(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks `hold` would take out of `free_blocks`."""
        return sum(1 for block_id in block_ids if self._references[block_id] == 0)

    def hold(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each of these blocks, which are held or cached."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                del self._unheld(block_id)[block_id]
            self._references[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks of undefined content with one reference each.

        Blank ones first, then the least recently used cached ones, which are forgotten, pinned
        ones last. The caller has checked `free_blocks`.
        """
        assert count <= self.free_blocks, f"{count} blocks asked of {self.free_blocks} free ones"
        block_ids = []
        for _ in range(count):
            if self._blank:
                block_id = self._blank.pop()
            else:
                block_id, _ = (self._cached or self._kept).popitem(last=False)
                self._forget(block_id)
            self._references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Take a reference from each of these blocks of one sequence, in its order.

        The last block becomes the first to be evicted: a prefix is of use without its end, never
        without its beginning.
        """
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} released, but nobody holds it"
            self._references[block_id] -= 1
            if self._references[block_id] > 0:
                continue
            if self._key[block_id] is None:
                self._blank.append(block_id)
            else:
                self._unheld(block_id)[block_id] = None

    def register(self, block_id: int, key: bytes, tokens: bytes, *, decoded: bool = False) -> None:
        """Make a held, full block findable. A key goes on naming its first block."""
        assert self._references[block_id] > 0, f"block {block_id} registered, but nobody holds it"
        if key in self._by_key or self._key[block_id] is not None:
            return
        self._by_key[key] = block_id
        self._key[block_id], self._tokens[block_id] = key, tokens
        self._decoded[block_id] = decoded

    def pin(self, keys: Sequence[bytes]) -> None:
        """Prefer every other block for being forgotten, until as many calls of `unpin`."""
        self._move(keys, 1)

    def unpin(self, keys: Sequence[bytes]) -> None:
        self._move(keys, -1)

    def _move(self, keys: Sequence[bytes], count: int) -> None:
        for key in reversed(keys):  # a prompt's end is the first to go here, too
            block_id = self._by_key.get(key)
            free = block_id is not None and self._references[block_id] == 0
            if block_id is not None and free:
                del self._unheld(block_id)[block_id]
            self._pins[key] += count
            if self._pins[key] <= 0:
                del self._pins[key]
            if block_id is not None and free:
                self._unheld(block_id)[block_id] = None

    def present(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of these blocks the pool has."""
        return len(list(takewhile(self._by_key.__contains__, keys)))

    def _unheld(self, block_id: int) -> OrderedDict[int, None]:
        """Where a block with content belongs that nobody refers to."""
        return self._kept if self._key[block_id] in self._pins else self._cached

    def _forget(self, block_id: int) -> None:
        key = self._key[block_id]
        assert key is not None
        del self._by_key[key]
        self._forgotten[block_id] += 1
        self._key[block_id] = self._tokens[block_id] = None
        self.pages.lost(key)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one place. For tests and idling."""
        blank, cached = set(self._blank), {*self._cached, *self._kept}
        held = {i for i, count in enumerate(self._references) if count > 0}
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not blank & cached, "a block is blank and cached"
        assert not held & (blank | cached), "a held block is free"
        for block_id in cached:
            assert block_id in self._unheld(block_id), "a pinned block is kept as if it were not"
        assert blank | cached | held == set(range(1, len(self._references))), "a block is lost"
        assert all(count >= 0 for count in self._references), "a reference count is negative"
        for key, block_id in self._by_key.items():
            assert self._tokens[block_id] is not None, (
                f"block {block_id} is indexed without content"
            )
            assert self._key[block_id] == key, f"block {block_id} is indexed under another's key"
            assert block_id not in blank, f"block {block_id} is indexed and blank"
        indexed = sum(1 for key in self._key if key is not None)
        assert indexed == len(self._by_key), "a block has content that nobody can find"

    def check_references(self, expected: dict[int, int]) -> None:
        """Raise AssertionError unless exactly these blocks are held, this many times each."""
        held = {i: count for i, count in enumerate(self._references) if count > 0}
        assert held == expected, f"the pool counts {held}, its holders {expected}"
