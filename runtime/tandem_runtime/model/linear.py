"""A linear layer, y = x W^T + b, prepacked where that pays.

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
    """y = x W^T + b. x: [rows, in]; W: [out, in] and b: [out], given once; y: [rows, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features = weight.shape[0]
        self._packed = weight.device.type == "cpu" and _packs(weight.dtype)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            run = torch.ops.mkldnn._linear_pointwise
            y: Tensor = run(x, self._weight, self._bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self._bias)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN computes in `dtype`; it says no by raising."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), _PACK_ROWS)
    except RuntimeError:
        return False
    return True
