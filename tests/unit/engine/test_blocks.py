"""The block pool: a model of who holds what, against any order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tandem_runtime.engine.blocks import SCRAP_BLOCK, BlockPool

BLOCKS = 9


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, share, register and return blocks; contents are plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.held: list[list[int]] = []
        self.content: dict[int, int] = {}
        """What each registered block holds, until it is handed out again."""
        self.pins: list[list[bytes]] = []

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.free_blocks:
            with pytest.raises(AssertionError, match="asked of"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        in_use = {block for blocks in self.held for block in blocks}
        assert len(set(blocks)) == count
        assert SCRAP_BLOCK not in blocks
        assert not set(blocks) & in_use, "a held block was handed out"
        pinned = {key for keys in self.pins for key in keys}
        lost = [self.content.pop(block) for block in blocks if block in self.content]
        if any(bytes([value]) in pinned for value in lost):
            left = [v for block, v in self.content.items() if block not in in_use | set(blocks)]
            assert all(bytes([value]) in pinned for value in left), "a pinned block went first"
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), value=st.integers(0, 6))
    def register(self, data: st.DataObject, value: int) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        known = value in self.content.values() or block in self.content
        self.pool.register(block, bytes([value]), bytes([value]))
        if not known:
            self.content[block] = value

    @rule(values=st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True))
    def share(self, values: list[int]) -> None:
        keys = [bytes([value]) for value in values]
        hits = self.pool.match(keys, keys)
        assert [self.content[block] for block in hits] == values[: len(hits)]
        if len(hits) < len(values):
            assert values[len(hits)] not in self.content.values(), "a block was not found"
        free = self.pool.free_blocks
        taken = self.pool.unheld(hits)
        self.pool.hold(hits)
        assert self.pool.free_blocks == free - taken
        if hits:
            self.held.append(hits)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @rule(values=st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True))
    def pin(self, values: list[int]) -> None:
        self.pins.append([bytes([value]) for value in values])
        self.pool.pin(self.pins[-1])

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pool.unpin(self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))))

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        expected: dict[int, int] = {}
        for blocks in self.held:
            for block in blocks:
                expected[block] = expected.get(block, 0) + 1
        self.pool.check_references(expected)
        assert self.pool.held_blocks == len(expected)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def keyed(pool: BlockPool, values: list[int]) -> list[int]:
    blocks = pool.allocate(len(values))
    for block, value in zip(blocks, values, strict=True):
        pool.register(block, bytes([value]), bytes([value]))
    return blocks


def find(pool: BlockPool, values: list[int]) -> list[int]:
    keys = [bytes([value]) for value in values]
    return pool.match(keys, keys)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(4)
    pool.release(keyed(pool, [1, 2, 3]))
    pool.allocate(1)
    assert len(find(pool, [1, 2, 3])) == 2


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(5)
    old, new = keyed(pool, [1, 2]), keyed(pool, [8, 9])
    pool.release(old)
    pool.release(new)
    pool.hold(find(pool, [1, 2]))
    pool.release(old)
    pool.allocate(2)
    assert find(pool, [1, 2]) == old
    assert find(pool, [8]) == []


def test_pinned_blocks_are_taken_last_and_kept_again_when_they_come_back() -> None:
    pool = BlockPool(5)
    pool.pin([bytes([1]), bytes([2])])
    pool.release(keyed(pool, [1, 2]))
    pool.release(keyed(pool, [8, 9]))
    pool.release(pool.allocate(2))
    assert len(find(pool, [1, 2])) == 2
    pool.release(pool.allocate(3))  # there is nothing else
    assert pool.present([bytes([1]), bytes([2])]) == 1
    pool.release(keyed(pool, [2]))
    pool.release(pool.allocate(2))
    assert pool.present([bytes([1]), bytes([2])]) == 2
    pool.unpin([bytes([1]), bytes([2])])
    pool.allocate(4)
    assert find(pool, [1]) == []


def test_a_blank_block_is_taken_before_a_cached_one() -> None:
    pool = BlockPool(4)
    pool.release(keyed(pool, [1, 2]))
    pool.allocate(1)
    assert len(find(pool, [1, 2])) == 2


def test_equal_keys_of_other_tokens_are_no_hit() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.register(block, b"key", b"tokens")
    assert pool.match([b"key"], [b"others"]) == []
    assert pool.match([b"key"], [b"tokens"]) == [block]


def test_a_pool_without_a_usable_block_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 2"):
        BlockPool(1)


@pytest.mark.parametrize("damage", ["_blank", "_by_key"])
def test_integrity_check_sees_damage(damage: str) -> None:
    pool = BlockPool(4)
    pool.release(keyed(pool, [1]))
    getattr(pool, damage).clear()
    with pytest.raises(AssertionError):
        pool.check_integrity()
