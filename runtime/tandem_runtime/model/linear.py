"""A linear layer without bias, y = x W^T, prepacked where that pays.

On the CPU the weight is packed once into oneDNN's own layout: 1.5 to 2 times as fast at decode as
`F.linear`, and each row of the result is bitwise independent of the others (docs/design/engine.md),
in float32 from two rows on.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_PACK_ROWS = 16
"""Rows that oneDNN optimises the layout for; any number can be multiplied."""


class Linear:
    """y = x W^T. x: [rows, in]; W: [out, in], given once; y: [rows, out]."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features = weight.shape[0]
        self._packed = weight.device.type == "cpu" and _packs(weight.dtype)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
            return y
        return functional.linear(x, self._weight)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN computes in `dtype`; it says no by raising."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), _PACK_ROWS)
    except RuntimeError:
        return False
    return True
