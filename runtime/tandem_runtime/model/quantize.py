"""Weights in fewer bits: the formats, and how a checkpoint's tensors become them.

Each row n of W [N, K] is divided into groups of columns that share a scale s (docs/design has why):

    int8: one group     s = max|W| / 127            q = round(W / s)
    int4: 32 columns    s = (max W - min W) / 15    q = round((W - z) / s) + 8    z = min W + 8 s

    W = s q (int8),  W = s (q - 8) + z (int4)

A tensor is quantised a piece at a time, and by a rank after it was cut: what is in memory beside
the quantised weights is one tensor.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from tandem_runtime.checkpoint.quantization import INT4_GROUP

_PIECE_ELEMENTS: Final = 1 << 24


class Quantized(NamedTuple):
    """A weight [N, K]. Scales and zeros are of the dtype that the model computes in."""

    values: Tensor
    """int8 [N, K]; or uint8 [N, K / 2], in which byte b of a group of 16 holds the group's column b
    in its low half and b + 16 in its high half."""
    scales: Tensor
    """[N, groups]"""
    zeros: Tensor | None = None
    """int4: [N, groups], what q = 8 stands for."""

    def dequantized(self) -> Tensor:
        """[N, K] in the scales' dtype."""
        if self.zeros is None:
            return self.values.to(self.scales.dtype) * self.scales
        q = unpack_int4(self.values).view(*self.scales.shape, INT4_GROUP).float() - 8
        return (q * self.scales[..., None] + self.zeros[..., None]).flatten(1).to(self.scales.dtype)


def quantize(weight: Tensor, form: str) -> Quantized:
    """`weight` as "int8" or "int4"."""
    rows = max(_PIECE_ELEMENTS // weight.shape[1], 1)
    run = _int8 if form == "int8" else _int4
    return stack([run(piece) for piece in torch.split(weight, rows)])


def stack(parts: list[Quantized]) -> Quantized:
    """These weights of one input, one after the other."""
    if len(parts) == 1:
        return parts[0]
    values, scales, zeros = zip(*parts, strict=True)
    joined = None if zeros[0] is None else torch.cat(zeros)
    return Quantized(torch.cat(values), torch.cat(scales), joined)


def _int8(weight: Tensor) -> Quantized:
    scales = _nonzero(weight.abs().amax(1, keepdim=True).float() / 127).to(weight.dtype)
    q = (weight.float() / scales.float()).round_().clamp_(-127, 127)
    return Quantized(q.to(torch.int8), scales)


def _int4(weight: Tensor) -> Quantized:
    groups = weight.view(len(weight), -1, INT4_GROUP).float()
    low, high = groups.aminmax(dim=2)
    scales = _nonzero((high - low) / 15).to(weight.dtype)
    zeros = (low + 8 * scales.float()).to(weight.dtype)
    q = ((groups - zeros[..., None].float()) / scales[..., None].float()).round_().add_(8)
    halves = q.clamp_(0, 15).to(torch.uint8).view(*scales.shape, 2, INT4_GROUP // 2)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    return Quantized(packed.flatten(1), scales, zeros)


def _nonzero(scales: Tensor) -> Tensor:
    """A group of equal values has no width, and q = 0 / 0 would be no number."""
    return scales.masked_fill_(scales == 0, 1.0)


def unpack_int4(values: Tensor) -> Tensor:
    """[N, K] uint8, 0 to 15, of `Quantized.values`."""
    halves = values.view(len(values), -1, 1, INT4_GROUP // 2)
    return torch.cat((halves & 15, halves >> 4), 2).flatten(1)
