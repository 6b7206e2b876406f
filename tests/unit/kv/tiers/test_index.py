"""The page index beside a dict."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime.kv.tiers.index import NONE, PageIndex

# Few first bytes, so that probes collide.
keys = st.builds(
    lambda a, b: bytes([a]) + bytes(7) + bytes([b]) + bytes(7), st.integers(0, 9), st.integers(0, 9)
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), keys), max_size=300))
def test_it_finds_what_a_dict_finds(steps: list[tuple[bool, bytes]]) -> None:
    index = PageIndex(20)
    slots: dict[bytes, int] = {}
    for add, key in steps:
        assert index.find(key) == slots.get(key, NONE)
        if key in slots and not add:
            index.remove(slots.pop(key))
        elif key not in slots and add and not index.full:
            slots[key] = index.add(key)
        assert len(index) == len(slots)
        assert len(set(slots.values())) == len(slots)
        for one, slot in slots.items():
            assert index.find(one) == slot
            assert index.key(slot) == one


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), keys), max_size=300),
    st.lists(keys, min_size=1, max_size=120),
    st.integers(1, 120),
)
def test_many_keys_are_found_as_one_by_one(
    steps: list[tuple[bool, bytes]], asked: list[bytes], known: int
) -> None:
    index, held = PageIndex(120), bytearray(120)
    for add, key in steps:
        slot = index.find(key)
        if slot != NONE and not add:
            index.remove(slot)
            held[slot] = 0
        elif slot == NONE:
            held[index.add(key)] = add
    for key in asked[:known]:  # a long run of keys that are there, and then any
        held[index.add(key) if index.find(key) == NONE else index.find(key)] = 1
    one_by_one = [index.find(key) != NONE and held[index.find(key)] > 0 for key in asked]
    assert index.leading(asked, held) == [*one_by_one, False].index(False)


def test_a_page_takes_less_than_64_bytes() -> None:
    assert max(PageIndex(count).page_bytes for count in (1000, 1 << 15, (1 << 15) + 1)) <= 36
