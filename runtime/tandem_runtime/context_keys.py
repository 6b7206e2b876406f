"""Keys of named contexts, hashed once: a prompt that begins with one goes on from its end.

Hashing is some 10 ms for a million tokens; a context's keys never change, so they are remembered
where prompts are hashed, in gateways and in pods.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import xxhash

from tandem_runtime.prefix import continue_keys, token_bytes
from tandem_runtime.protocol import Named

MOST_TOKENS: Final = 4 << 20
"""Of the contexts whose keys are remembered; a token takes 8 bytes where blocks have 16 tokens."""

_Name = tuple[bytes, str, float]


@dataclass
class _Known:
    """One context under one root."""

    digest: bytes = b""
    """XXH3 of its ids, where prompts are compared with them. Who finds a wrong key compares ids."""
    keys: dict[int, list[bytes]] = field(default_factory=dict)
    """Of its full blocks, by their size."""


class ContextKeys:
    """For any thread. Those used last are remembered."""

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._known: OrderedDict[_Name, tuple[int, _Known]] = OrderedDict()
        """With how many tokens it has."""
        self._tokens = 0
        self._lock = threading.Lock()

    def keys(
        self,
        root: bytes,
        named: Named | None,
        sizes: Sequence[int],
        tokens: bytes | memoryview,
    ) -> list[list[bytes]]:
        """The keys of a prompt's full blocks, for each size of them: those of `prefix.keys_of`, in
        lists of the caller's.

        Args:
            root: of the keys.
            named: what the prompt begins with. It is compared: other tokens are hashed anew.
            sizes: tokens of a block.
            tokens: the prompt, as `prefix.token_bytes` or `token_view` gives it.
        """
        view, known = memoryview(tokens), self._find(root, named)
        digest = b"" if named is None else xxhash.xxh3_128_digest(view[: 4 * named.tokens])
        if known.digest != digest:
            known = _Known()
        found = []
        for size in sizes:
            keys = known.keys.get(size, [])[:]
            continue_keys(keys, root, view[4 * size * len(keys) :], size)
            found.append(keys)
        if named is not None and not known.keys.keys() >= set(sizes):
            self._learn(root, named, _Known(digest, known.keys | _of(named, sizes, found)))
        return found

    def keys_of_ids(
        self, root: bytes, named: Named | None, sizes: Sequence[int], ids: Sequence[int]
    ) -> list[list[bytes]]:
        """The same of token ids, of which only those behind the context are read: who made the
        prompt is believed that it begins with the context."""
        known, found = self._find(root, named), []
        for size in sizes:
            keys = known.keys.get(size, [])[:]
            continue_keys(keys, root, token_bytes(ids[len(keys) * size :]), size)
            found.append(keys)
        if named is not None and not known.keys.keys() >= set(sizes):
            self._learn(root, named, _Known(b"", known.keys | _of(named, sizes, found)))
        return found

    def knows(self, root: bytes, named: Named | None) -> bool:
        """Whether the context need not be hashed again."""
        return bool(self._find(root, named).keys)

    def _find(self, root: bytes, named: Named | None) -> _Known:
        if named is None:
            return _Known()
        name = (root, named.id, named.made_unix_s)
        with self._lock:
            if name not in self._known:
                return _Known()
            self._known.move_to_end(name)
            return self._known[name][1]

    def _learn(self, root: bytes, named: Named, known: _Known) -> None:
        name = (root, named.id, named.made_unix_s)
        with self._lock:
            self._forget(name)
            self._known[name] = named.tokens, known
            self._tokens += named.tokens
            while self._tokens > self._most_tokens and len(self._known) > 1:
                self._forget(next(iter(self._known)))

    def _forget(self, name: _Name) -> None:
        if name in self._known:
            self._tokens -= self._known.pop(name)[0]


def _of(named: Named, sizes: Sequence[int], found: Sequence[list[bytes]]) -> dict[int, list[bytes]]:
    """Of a prompt's keys those of the context."""
    of_sizes = zip(sizes, found, strict=True)
    return {size: keys[: named.tokens // size] for size, keys in of_sizes}
