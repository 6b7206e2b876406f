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


@cache
def values_of(dtype: torch.dtype) -> Tensor:
    """[256] what each code stands for."""
    return torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)
