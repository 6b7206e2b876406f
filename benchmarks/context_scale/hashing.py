"""A context of 1,000,000 tokens: its keys, and whether a tier has its pages; then the same of
prompts that begin with it under its name, as pods and gateways do it.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Final

import numpy as np
import xxhash
from tandem_runtime.context_keys import ContextKeys
from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.kv.tiers.policy import TierPolicy
from tandem_runtime.prefix import KEY_BYTES, block_keys, compact, token_bytes, token_view
from tandem_runtime.protocol import Named

from benchmarks.context_scale.timing import Times, timed, times_of

TOKENS: Final = 1_000_000
_RUNS: Final = 25
_BLOCKS: Final = {"a pod on the CPU": 64, "a pod on a GPU": 16}
"""Tokens of a block of the KV cache. A gateway has the pods' blocks."""
_OTHERS: Final = 7
"""Contexts of the same length in the same tier."""


def measure() -> tuple[dict[str, Times], float]:
    """The runtime's own hashing and look-up beside what limits them; index bytes for a page."""
    chance = random.Random(3)
    ids = [chance.randrange(128_000) for _ in range(TOKENS)]
    packed, tokens, root = array("I", ids), token_bytes(ids), bytes(32)
    words = np.frombuffer(tokens, np.uint64)
    keys = block_keys(root, ids, KV_PAGE_TOKENS)
    policy = TierPolicy((1 + _OTHERS) * len(keys))
    for other in range(1 + _OTHERS):
        policy.use("tenant", block_keys(bytes([other]) * 32, packed, KV_PAGE_TOKENS))
    if policy.lookup(keys) != len(keys) or policy.lookup([*keys[:-1], bytes(16)]) != len(keys) - 1:
        raise RuntimeError("the pages of a context that is kept were not found")
    works: dict[str, Callable[[], object]] = {
        "hash, ids in a list": lambda: block_keys(root, ids, KV_PAGE_TOKENS),
        "hash, ids in an array": lambda: block_keys(root, packed, KV_PAGE_TOKENS),
        "look up": lambda: policy.lookup(keys),
        "hash and look up": lambda: policy.lookup(block_keys(root, packed, KV_PAGE_TOKENS)),
        "peer: blake2b in one call": lambda: blake2b(tokens, digest_size=KEY_BYTES).digest(),
        "peer: XXH3 in one call": lambda: xxhash.xxh3_128_digest(tokens),
        "limit: read the ids once": words.sum,
    }
    works |= _named(policy, root, ids, keys)
    return {name: times_of(timed(work, _RUNS)) for name, work in works.items()}, policy.page_bytes


def _named(
    policy: TierPolicy, root: bytes, ids: list[int], pages: list[bytes]
) -> dict[str, Callable[[], object]]:
    """Questions of a hundred tokens to the context."""
    named = Named("context", 0.0, len(ids))
    prompt = [*ids, *range(100)]
    packed = compact(prompt)
    works: dict[str, Callable[[], object]] = {}

    def in_pod(contexts: ContextKeys, block_tokens: int) -> int:
        view = token_view(packed)
        return policy.lookup(contexts.keys(root, named, (block_tokens, KV_PAGE_TOKENS), view)[1])

    for place, block_tokens in _BLOCKS.items():
        works[f"named context, in {place}"] = partial(in_pod, ContextKeys(), block_tokens)
    of_gateway, sizes = ContextKeys(), (min(_BLOCKS.values()), KV_PAGE_TOKENS)
    works["named context, in a gateway"] = lambda: policy.lookup(
        of_gateway.keys_of_ids(root, named, sizes, prompt)[1]
    )
    if any(work() != len(pages) for work in works.values()):
        raise RuntimeError("the pages of the named context were not found")
    return works
