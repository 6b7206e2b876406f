"""Prefix keys: equal where everything before is equal, different where anything differs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.prefix import KEY_BYTES, block_keys, compact, extend_keys, root_key, token_bytes

ROOT = root_key(b"layout", b"secret", "tenant", "")
ids = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def test_keys_are_known_and_do_not_depend_on_the_process() -> None:
    keys = block_keys(ROOT, range(40), 16)
    assert [key.hex() for key in keys] == [
        "11f3c0ec5903edc75a89aacb8831887f",
        "00edc759603072c822cd891854d2d4e3",
    ]
    assert all(len(key) == KEY_BYTES for key in keys)


def test_roots_differ_in_layout_secret_tenant_and_salt() -> None:
    roots = {
        root_key(b"layout", b"secret", "tenant", ""),
        root_key(b"other", b"secret", "tenant", ""),
        root_key(b"layout", b"other", "tenant", ""),
        root_key(b"layout", b"secret", "other", ""),
        root_key(b"layout", b"secret", "tenant", "salt"),
        # Boundaries between the parts count.
        root_key(b"layou", b"secret", "tenant", "t"),
    }
    assert len(roots) == 6


def test_token_bytes_are_little_endian_words() -> None:
    assert token_bytes([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"


@given(ids, st.integers(1, 17))
def test_full_blocks_have_keys_and_the_rest_has_none(tokens: list[int], block: int) -> None:
    assert len(block_keys(ROOT, tokens, block)) == len(tokens) // block


@given(ids, ids, st.integers(1, 9))
def test_keys_are_equal_exactly_as_long_as_the_tokens_are(
    a: list[int], b: list[int], block: int
) -> None:
    keys_a, keys_b = block_keys(ROOT, a, block), block_keys(ROOT, b, block)
    for index in range(min(len(keys_a), len(keys_b))):
        same = a[: (index + 1) * block] == b[: (index + 1) * block]
        assert (keys_a[index] == keys_b[index]) == same


@given(ids, st.integers(0, 60), st.integers(1, 9))
def test_extending_in_steps_gives_the_same_keys(tokens: list[int], cut: int, block: int) -> None:
    keys: list[bytes] = []
    extend_keys(keys, ROOT, tokens[:cut], block)
    extend_keys(keys, ROOT, tokens, block)
    assert keys == block_keys(ROOT, tokens, block)


@given(ids, st.integers(1, 9))
def test_compact_ids_are_the_same_ids(tokens: list[int], block: int) -> None:
    assert list(compact(tokens)) == tokens
    assert block_keys(ROOT, compact(tokens), block) == block_keys(ROOT, tokens, block)


def test_many_ids_are_compact_too_and_what_is_none_stays() -> None:
    many = list(range(20_000))
    assert list(compact(many)) == many
    for wrong in (-1, 2**32):
        assert compact([*many, wrong]) == [*many, wrong]
