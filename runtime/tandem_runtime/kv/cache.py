"""The pool's memory on the device, and its passage to and from canonical pages.

One tensor [layers, k|v, blocks, kv heads, block tokens, head dim]: a head's block is contiguous,
which attention reads, and a block's heads are adjacent, which copies like. Allocated once. On the
CPU a block's elements lie in another order (kernels/cpu_attention.py).

Invariant on the CPU, whose attention multiplies whole tiles: what a stream has not written of its
blocks is zero, never another stream's remains, which could be infinite or NaN.
"""

from __future__ import annotations

import torch

from tandem_runtime import kernels
from tandem_runtime.kv.layout import KvLayout

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


class KvCache:
    """KV of `block_count` blocks of `block_tokens` tokens each."""

    def __init__(
        self, layout: KvLayout, block_count: int, block_tokens: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.block_tokens = block_tokens
        self.data = torch.zeros(
            (layout.layers, 2, block_count, layout.kv_heads, block_tokens, layout.head_dim),
            dtype=DTYPES[layout.dtype],
            device=device,
        )

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
        page = kernels.gather_blocks(self.data, ids, inside, end - start)
        # Pinned where there is a GPU: several times as fast to copy to, and back.
        host = torch.empty_like(page, device="cpu", pin_memory=page.is_cuda).copy_(page)
        return host.view(torch.uint8).numpy().data.cast("B")

    def write(
        self, block_ids: list[int], start: int, payload: bytes | bytearray | memoryview
    ) -> None:
        """Store canonical bytes as the tokens from `start` on."""
        layout = self.layout
        shape = (layout.layers, 2, layout.kv_heads, -1, layout.head_dim)
        last, rest = divmod(
            start + memoryview(payload).nbytes // layout.token_bytes, self.block_tokens
        )
        if rest and last * self.block_tokens >= start:
            self.begin([block_ids[last] * self.block_tokens])
        if memoryview(payload).readonly:
            payload = bytearray(payload)
        page = torch.frombuffer(payload, dtype=self.data.dtype).view(shape)
        ids, inside = self._span(block_ids, start, start + page.shape[3])
        kernels.scatter_blocks(page.to(self.data.device), self.data, ids, inside)

    def _span(self, block_ids: list[int], start: int, end: int) -> tuple[torch.Tensor, int]:
        """The blocks that hold tokens [start, end), and where in the first of them these begin."""
        first, size = start // self.block_tokens, self.block_tokens
        return self._ids(block_ids[first : -(-end // size)]), start - first * size

    def _ids(self, block_ids: list[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).to(self.data.device)
