"""The pool's memory on the device, and its passage to and from canonical pages.

One tensor [layers, k|v, blocks, kv heads, block tokens, head dim]: a head's block is contiguous,
which attention reads, and a block's heads are adjacent, which copies like. Allocated once. On the
CPU a block's elements lie in another order (kernels/cpu_attention.py).

Invariant on the CPU, whose attention multiplies whole tiles: what a stream has not written of its
blocks is zero, never another stream's remains, which could be infinite or NaN.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Final

import torch

from tandem_runtime import kernels
from tandem_runtime.kv.layout import KvLayout, Payload

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
_PIECE_BYTES: Final = 64 << 20
"""Of a page that are on the device at once."""


def pinned_bytes(page_bytes: int) -> int:
    """What a page takes where there is a GPU: torch pins powers of two."""
    return 1 << (page_bytes - 1).bit_length()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The pool. On the CPU in pages of 2 MB where the system has them: attention, which goes from
    block to block, waits less for addresses to be translated."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = prod(shape)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=private)
    with suppress(AttributeError, OSError):  # no Linux, or one without such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


class KvCache:
    """KV of `block_count` blocks of `block_tokens` tokens each."""

    def __init__(
        self, layout: KvLayout, block_count: int, block_tokens: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.block_tokens = block_tokens
        shape = (layout.layers, 2, block_count, layout.kv_heads, block_tokens, layout.head_dim)
        self.data = _zeros(shape, DTYPES[layout.dtype], device)

    def begin(self, slots: list[int]) -> None:
        """Clear the blocks whose first slot is among those that are about to be written."""
        if self.data.device.type == "cpu":
            first = [slot // self.block_tokens for slot in slots if slot % self.block_tokens == 0]
            if first:
                fp8 = self.layout.dtype == "fp8"  # which torch cannot fill
                whole = self.data.view(torch.uint8) if fp8 else self.data
                whole.index_fill_(2, self._ids(first), 0)

    def read(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """Canonical bytes of tokens [start, end) of the sequence that these blocks hold; a copy."""
        ids, inside = self._span(block_ids, start, end)
        # Pinned where there is a GPU: several times as fast to copy to, and back.
        host = torch.empty(
            self._shape(end - start), dtype=self.data.dtype, pin_memory=self.data.is_cuda
        )
        for target, pool in self._pieces(host):
            target.copy_(kernels.gather_blocks(pool, ids, inside, end - start))
        return host.view(torch.uint8).numpy().data.cast("B")

    def write(
        self, block_ids: list[int], start: int, payload: Payload, layers: range | None = None
    ) -> None:
        """Store canonical bytes as the tokens from `start` on; of some layers alone, the first ones
        first, if the payload is these layers'."""
        layers = layers or range(self.layout.layers)
        size = self.layout.token_bytes * len(layers) // self.layout.layers
        tokens = memoryview(payload).nbytes // size
        last, rest = divmod(start + tokens, self.block_tokens)
        if rest and last * self.block_tokens >= start and layers.start == 0:
            self.begin([block_ids[last] * self.block_tokens])
        if memoryview(payload).readonly:
            payload = bytearray(payload)
        shape = (len(layers), *self._shape(tokens)[1:])
        page = torch.frombuffer(payload, dtype=self.data.dtype).view(shape)
        ids, inside = self._span(block_ids, start, start + tokens)
        for part, pool in self._pieces(page, layers.start):
            kernels.scatter_blocks(part.to(self.data.device), pool, ids, inside)

    def _shape(self, tokens: int) -> tuple[int, ...]:
        """Of a canonical page."""
        layout = self.layout
        return (layout.layers, 2, layout.kv_heads, tokens, layout.head_dim)

    def _pieces(
        self, page: torch.Tensor, first_layer: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A few layers of a page at a time, and of the pool, which leaves little room beside it."""
        count = max(1, _PIECE_BYTES * len(page) // page.nbytes)
        pool = self.data[first_layer : first_layer + len(page)]
        return zip(torch.split(page, count), torch.split(pool, count), strict=True)

    def _span(self, block_ids: list[int], start: int, end: int) -> tuple[torch.Tensor, int]:
        """The blocks that hold tokens [start, end), and where in the first of them these begin."""
        first, size = start // self.block_tokens, self.block_tokens
        return self._ids(block_ids[first : -(-end // size)]), start - first * size

    def _ids(self, block_ids: list[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).to(self.data.device)
