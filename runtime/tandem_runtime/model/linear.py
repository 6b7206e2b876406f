"""A linear layer, y = x W^T + b: torch's on a GPU; on the CPU packed once (kernels/linear.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tandem_runtime import kernels
from tandem_runtime.kernels.fp8_quantize import FP8, fp8_quantize_reference
from tandem_runtime.model.quantize import Quantized

Projection = Callable[[Tensor], Tensor]
"""x -> x W^T + b, of whatever format W is."""


class Linear:
    """y = x W^T + b. x: [rows, in]; W: [out, in] and b: [out], given once; y: [rows, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features = weight.shape[0]
        self._packed = weight.device.type == "cpu"
        self._weight = kernels.pack_linear(weight) if self._packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return kernels.linear_cpu(x, self._weight, self.out_features, self._bias)
        return functional.linear(x, self._weight, self._bias)


def quantized_linear(weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Projection:
    """The layer of a quantised weight, for the device that it is on; `dtype` is computed in.

    On the CPU int8 and int4 are multiplied in bfloat16 alone; in other dtypes it is ten times as
    fast to keep the weights that they stand for.
    """
    values, scales, zeros, bound = weight
    form = values.dtype
    if kernels.uses_triton(values.device):
        if form == FP8:
            return lambda x: kernels.fp8_linear(x, values, scales, bias, bound)
        if zeros is None:
            return lambda x: kernels.int8_linear(x, values, scales, bias)
        return lambda x: kernels.int4_linear(x, values, scales, zeros, bias)
    if form == FP8:
        return Fp8Linear(weight, bias)
    if dtype != torch.bfloat16:
        return Linear(weight.dequantized(), bias)
    return Int8Linear(weight, bias) if zeros is None else Int4Linear(weight, bias)


def recordable(projection: Projection) -> bool:
    """Whether it is one kernel of the CPU's team, which `kernels.team.Recording` can repeat."""
    return isinstance(projection, Linear | Int4Linear)


class Fp8Linear:
    """y as in kernels/scaled_linear.py, of rows in fp8 too, on the CPU.

    It multiplies by float32 copies, since turning fp8 into floats takes forty times as long as the
    product of a decode step: it is there to try out what GPUs do, not to save memory.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        groups = weight.scales.shape[1]
        self._groups = [Linear(part.float()) for part in weight.values.chunk(groups, 1)]
        self._scales, self._bound = weight.scales, weight.bound
        self._bias = 0.0 if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        q, t = fp8_quantize_reference(x, len(self._groups), self._bound)
        y = x.new_zeros(len(x), len(self._scales), dtype=torch.float32)
        for index, part in enumerate(q.chunk(len(self._groups), 1)):
            y += self._groups[index](part.float()) * t[:, index, None] * self._scales[:, index]
        return (y + self._bias).to(x.dtype)


class Int8Linear:
    """y = x W^T + b with W of int8, in bfloat16 on the CPU."""

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        self._values, self._scales = weight.values, weight.scales.flatten()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self._values, self._scales)
        return y if self._bias is None else y.add_(self._bias)


class Int4Linear:
    """y = x W^T + b with W of int4, in bfloat16 on the CPU."""

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        assert weight.zeros is not None
        self._packed = kernels.pack_int4(weight.values, weight.scales, weight.zeros)
        self._outputs, self._bias = len(weight.scales), bias

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.int4_linear_cpu(x, *self._packed, self._outputs, self._bias)
