"""What a token's KV cache is made of, and the canonical form in which it travels.

The canonical form of tokens [a, b) is one contiguous array [layer, k|v, kv head, token, head dim]
of the cache's dtype, little-endian. It can be sliced by layer and by kv head, so pods of other
block sizes, devices and tensor-parallel sizes exchange it; how a pool arranges its blocks in memory
is its own affair (kv/cache.py). docs/design/layouts.md has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from tandem_runtime.prefix import FORMAT

ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of what models compute in."""
KV_BYTES: Final = ITEM_BYTES | {"fp8": 1}
"""Of what the cache holds; fp8: e4m3 without a scale (kernels/fp8_kv.py)."""
KV_FORMATS: Final = ("auto", "fp8")
"""What may be asked for; auto: what the model computes in."""

Payload = bytes | bytearray | memoryview
"""KV in canonical form."""


@dataclass(frozen=True)
class KvLayout:
    """Shape and dtype of one model's KV cache."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    """`float32`, `bfloat16`, `float16` or `fp8`."""

    def __post_init__(self) -> None:
        if self.dtype not in KV_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is none of {', '.join(KV_BYTES)}")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * KV_BYTES[self.dtype]

    def hash(self, model_digest: str, computed: str = "") -> bytes:
        """32 bytes that are equal only where exchanging KV cache is meaningful.

        Args:
            model_digest: `ModelConfig`'s digest; it covers weights and rope parameters.
            computed: `EngineConfig.computed`: what else decides the values.
        """
        text = f"{model_digest}|{self.layers}|{self.kv_heads}|{self.head_dim}|{self.dtype}"
        text += f"|{computed}" if computed else ""
        return blake2b(FORMAT + b"|" + text.encode(), digest_size=32).digest()
