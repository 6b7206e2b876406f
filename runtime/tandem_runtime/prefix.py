"""Keys of KV blocks: two blocks have one key when model, tenant, salt and all tokens so far agree.

A key is a keyed blake2b-128 over (key of the block before, token ids of this block). The hash's own
key is the *root*, derived from (format version, layout hash, HMAC(secret, tenant), salt):

- a tenant cannot guess another's keys, since the secret is not his;
- a client's salt narrows what is shared and never widens it, since the tenant stays in the root;
- keys do not depend on the process, so gateway and pods of one fleet compute the same ones.

Whoever finds a key still compares the token ids: 128 bits are few enough to be careful with.
"""

from __future__ import annotations

import hmac
import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

KEY_BYTES: Final = 16
_AT_ONCE: Final = 1 << 13
"""Ids that are converted in one go: no other thread runs meanwhile."""
FORMAT: Final = b"tandem-kv/1"
"""Version of the canonical block and of these keys; part of every root."""


def root_key(layout_hash: bytes, secret: bytes, tenant: str, salt: str) -> bytes:
    """The 32-byte root from which one tenant's (and salt's) keys are chained.

    Args:
        layout_hash: `KvLayout.hash` of the model's cache.
        secret: the namespace's handoff secret; empty where a pod serves alone.
        tenant: who asks; streams of two tenants never share a block.
        salt: the client's own, from the request; empty when he gave none.
    """
    parts = (
        FORMAT,
        layout_hash,
        hmac.digest(secret, tenant.encode(), "sha256"),
        salt.encode(),
    )
    root = blake2b(digest_size=32)
    for part in parts:
        root.update(len(part).to_bytes(8, "little"))
        root.update(part)
    return root.digest()


def compact(token_ids: Sequence[int]) -> Sequence[int]:
    """A copy of the ids in an array, which is copied and checked a hundred times faster than a
    list; the ids as they are, where one of them is no uint32."""
    if isinstance(token_ids, array):
        return token_ids[:]
    ids = array("I")
    try:
        for start in range(0, len(token_ids), _AT_ONCE):
            ids += array("I", token_ids[start : start + _AT_ONCE])
    except OverflowError:
        return token_ids
    return ids


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, the form in which they are hashed and compared."""
    ids = token_ids if isinstance(token_ids, array) else array("I", token_ids)
    if sys.byteorder == "big":
        ids = array("I", ids)
        ids.byteswap()
    return ids.tobytes()


def token_view(token_ids: Sequence[int]) -> memoryview:
    """The same without a copy of an array, whose length nobody may change while this is used."""
    if isinstance(token_ids, array) and sys.byteorder == "little":
        return memoryview(token_ids).cast("B")
    return memoryview(token_bytes(token_ids))


def extend_keys(
    keys: list[bytes], root: bytes, token_ids: Sequence[int], block_tokens: int
) -> None:
    """Append to `keys` those of the full blocks of `token_ids` that it does not cover yet.

    `keys` holds the first blocks' keys already (possibly none), all made with the same root.
    """
    first, end = len(keys) * block_tokens, len(token_ids) // block_tokens * block_tokens
    if first < end:
        # All at once: a conversion for each block would take longer than the hashing.
        tokens = token_bytes(token_ids[first:end] if first else token_ids)
        continue_keys(keys, root, tokens, block_tokens)


def block_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of the full blocks of `token_ids`, first block first; a partial block has none."""
    return keys_of(root, token_bytes(token_ids), block_tokens)


def keys_of(root: bytes, tokens: bytes, block_tokens: int) -> list[bytes]:
    """The same, of what `token_bytes` gave."""
    keys: list[bytes] = []
    continue_keys(keys, root, tokens, block_tokens)
    return keys


def continue_keys(
    keys: list[bytes], root: bytes, tokens: bytes | memoryview, block_tokens: int
) -> None:
    """Append to `keys` those of the full blocks of `tokens` (`token_bytes`), which follow those
    that it has."""
    block_bytes = 4 * block_tokens
    parent, view = keys[-1] if keys else bytes(KEY_BYTES), memoryview(tokens)
    for end in range(block_bytes, len(tokens) + 1, block_bytes):
        block = parent + view[end - block_bytes : end]
        parent = blake2b(block, digest_size=KEY_BYTES, key=root).digest()
        keys.append(parent)
