"""Weights in fewer bits: the formats, and how a checkpoint's tensors become them.

Each row n of W [N, K] is divided into groups of columns that share a scale s (docs/design has why):

    fp8:  one group     s = max|W| / 448            q = e4m3(W / s)
    int8: one group     s = max|W| / 127            q = round(W / s)
    int4: 32 columns    s = (max W - min W) / 15    q = round((W - z) / s) + 8    z = min W + 8 s

    W = s q (fp8, int8),  W = s (q - 8) + z (int4)

A tensor is quantised a piece at a time, and by a rank after it was cut: what is in memory beside
the quantised weights is one tensor.
"""

from __future__ import annotations

from math import inf
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tandem_runtime.checkpoint.quantization import INT4_GROUP
from tandem_runtime.kernels.fp8_quantize import fp8_quantize_reference
from tandem_runtime.kernels.int4_linear import unpack_int4

_PIECE_ELEMENTS: Final = 1 << 18


class Quantized(NamedTuple):
    """A weight [N, K]. Scales and zeros are float32 for fp8, else what the model computes in."""

    values: Tensor
    """float8_e4m3fn or int8 [N, K], or uint8 [N, K / 2] (kernels/int4_linear.py)."""
    scales: Tensor
    """[N, groups]"""
    zeros: Tensor | None = None
    """int4: [N, groups], what q = 8 stands for."""

    bound: float = inf
    """fp8: of the activations, see kernels/fp8_quantize.py."""

    def to(self, device: torch.device) -> Quantized:
        """The same there."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Quantized(self.values.to(device), self.scales.to(device), zeros, self.bound)

    def dequantized(self) -> Tensor:
        """[N, K] in the scales' dtype."""
        if self.zeros is None:
            groups = self.values.view(*self.scales.shape, -1).to(self.scales.dtype)
            return (groups * self.scales[..., None]).flatten(1)
        q = unpack_int4(self.values).view(*self.scales.shape, INT4_GROUP).float() - 8
        return (q * self.scales[..., None] + self.zeros[..., None]).flatten(1).to(self.scales.dtype)


def quantize(weight: Tensor, form: str) -> Quantized:
    """`weight` as "fp8", "int8" or "int4"."""
    rows = max(_PIECE_ELEMENTS // weight.shape[1], 1)
    run = {"fp8": _fp8, "int8": _int8, "int4": _int4}[form]
    return stack([run(piece) for piece in torch.split(weight, rows)])


def stack(parts: list[Quantized]) -> Quantized:
    """These weights of one input, one after the other."""
    if len(parts) == 1:
        return parts[0]
    values, scales, zeros, bounds = zip(*parts, strict=True)
    joined = None if zeros[0] is None else torch.cat(zeros)
    return Quantized(torch.cat(values), torch.cat(scales), joined, min(bounds))


def _fp8(weight: Tensor) -> Quantized:
    return Quantized(*fp8_quantize_reference(weight))


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
