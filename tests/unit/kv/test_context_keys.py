"""A named context is hashed once, and keys are those of hashing every prompt whole."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_runtime import context_keys
from tandem_runtime.context_keys import ContextKeys
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.gateway.hashing import PromptHasher
from tandem_runtime.prefix import block_keys, root_key, token_bytes, token_view
from tandem_runtime.protocol import GenerateRequest, Named, Sampling

ROOTS = [b"a" * 32, b"b" * 32]
CONTEXTS = [[n * 7 % 101 + number for n in range(90 + 40 * number)] for number in range(3)]


@dataclass(frozen=True)
class Ask:
    root: int
    context: int
    lies: bool
    """It names another context than the one that it begins with."""
    sizes: tuple[int, ...]
    tail: list[int]


ASKS = st.builds(
    Ask,
    st.integers(0, 1),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([(8,), (16,), (16, 64), (64, 8)]),
    st.lists(st.integers(0, 1000), max_size=40),
)


@settings(deadline=None)
@given(st.lists(ASKS, max_size=12), st.sampled_from([100, 1 << 20]))
def test_keys_are_those_of_the_whole_prompt(asks: list[Ask], most_tokens: int) -> None:
    compared, believed = ContextKeys(most_tokens), ContextKeys(most_tokens)
    for ask in asks:
        context = CONTEXTS[ask.context]
        named = Named(str((ask.context + ask.lies) % 3), 1.0, len(context))
        honest = Named(str(ask.context), 1.0, len(context))
        ids, root = array("I", [*context, *ask.tail]), ROOTS[ask.root]
        wholes = [block_keys(root, ids, size) for size in ask.sizes]
        found = compared.keys(root, named, ask.sizes, token_view(ids))
        assert found == wholes
        found[0].clear()  # the lists are the caller's
        assert believed.keys_of_ids(root, honest, ask.sizes, ids.tolist()) == wholes
        assert compared.keys(root, None, ask.sizes, token_bytes(ids)) == wholes


def test_a_context_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    continue_keys = context_keys.continue_keys

    def counted(keys: list[bytes], root: bytes, tokens: Any, size: int) -> None:
        hashed.append(len(tokens) // 4)
        continue_keys(keys, root, tokens, size)

    monkeypatch.setattr(context_keys, "continue_keys", counted)
    contexts, ids = ContextKeys(), CONTEXTS[2]  # 170 tokens: ten blocks and a rest
    named = Named("c", 1.0, len(ids))
    for tail in ([1] * 5, [2] * 30):
        contexts.keys(ROOTS[0], named, (16, 64), token_bytes(ids + tail))
    assert hashed == [175, 175, 10 + 30, 42 + 30]
    # What is made later under that name is another one.
    contexts.keys(ROOTS[0], Named("c", 2.0, 170), (16,), token_bytes(ids))
    # So are its blocks of another size.
    contexts.keys(ROOTS[0], named, (16, 32), token_bytes(ids))
    contexts.keys(ROOTS[0], named, (16, 64, 32), token_bytes(ids))
    assert hashed[4:] == [170, 10, 170, 10, 42, 10]


def test_what_was_used_last_is_remembered() -> None:
    contexts = ContextKeys(most_tokens=300)
    names = [Named(str(number), 1.0, len(ids)) for number, ids in enumerate(CONTEXTS)]
    for number in (0, 1, 0, 2):  # 90, 130 and 170 tokens
        contexts.keys_of_ids(ROOTS[0], names[number], (16,), CONTEXTS[number])
    assert [contexts.knows(ROOTS[0], named) for named in names] == [True, False, True]


class _Bundle:
    cache_root = "ab" * 32
    block_tokens = 16


async def test_a_gateways_keys_are_the_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_runtime.gateway.hashing.LONG_TOKENS", 100)
    hasher, bundle = PromptHasher(b"secret"), _Bundle()
    context = [n % 997 for n in range(700)]
    root = root_key(bytes.fromhex(bundle.cache_root), b"secret", "t", "")
    for tail in ([5] * 20, [6] * 80):
        ids = context + tail
        request = GenerateRequest(
            "s", 0, ids, Sampling(max_tokens=1), tenant="t", begins=Named("c", 1.0, 700)
        )
        keys = await hasher.keys(bundle, request)  # type: ignore[arg-type]
        assert keys.blocks == block_keys(root, ids, 16)
        assert keys.below == block_keys(root, ids, KV_PAGE_TOKENS)
        longer = [*ids, *range(300)]
        whole = hasher.of(bundle, request, longer)  # type: ignore[arg-type]
        assert whole.blocks == block_keys(root, longer, 16)
