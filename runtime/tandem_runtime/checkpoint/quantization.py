"""Formats of quantised weights, and which models can have them. No torch."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Final, Literal

from tandem_runtime.checkpoint.config import ModelConfig

WeightFormat = Literal["none", "fp8", "int8", "int4"]
WEIGHT_FORMATS: Final[tuple[WeightFormat, ...]] = ("none", "fp8", "int8", "int4")
EXCLUDABLE: Final = ("attention", "first-layer", "last-layer")
"""Linears that may stay as they are where the others are quantised at load."""
INT4_GROUP: Final = 32
"""Columns of a row that share a scale and a zero."""
_GRAINS: Final = {"fp8": 16, "fp8 in blocks": 128, "int8": 16, "int4": INT4_GROUP}
"""Rows come in sixteens, columns in these: what the kernels of CPUs and GPUs load at once."""


def loaded_bytes(
    config: ModelConfig, form: str, item_bytes: int, quantized: Collection[str] | None = None
) -> int:
    """Of the model's weights on an accelerator, what is not quantised with `item_bytes` each.

    `quantized`: the names of those that are; None: all that can be.
    """
    quantized = quantized_names(config) if quantized is None else quantized
    total = 0
    for name, shape in config.tensor_shapes().items():
        bits, scale_bytes = 8 * item_bytes, 0
        if form != "none" and name in quantized:
            bits = 4 if form == "int4" else 8
            groups = shape[1] // _GRAINS[form] if form in ("int4", "fp8 in blocks") else 1
            each = {"int8": item_bytes, "int4": 2 * item_bytes}.get(form, 4)
            scale_bytes = shape[0] * groups * each
        total += prod(shape) * bits // 8 + scale_bytes
    return total


def quantizable(name: str) -> bool:
    """Whether a tensor is the weight of one of the layers' linears."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def excluded(name: str, layers: int, exclude: Collection[str]) -> bool:
    """Whether a layer's linear is among those that are not quantised.

    Args:
        name: of its weight.
        layers: that the model has.
        exclude: of `EXCLUDABLE`.
    """
    index = int(name.split(".")[2])
    kinds = {
        "attention": ".self_attn." in name,
        "first-layer": index == 0,
        "last-layer": index == layers - 1,
    }
    return any(kinds[kind] for kind in exclude)


def quantized_names(config: ModelConfig, exclude: Collection[str] = ()) -> frozenset[str]:
    """The weights that are quantised at load."""
    linears = filter(quantizable, config.tensor_shapes())
    return frozenset(name for name in linears if not excluded(name, config.layers, exclude))


def misfit(config: ModelConfig, form: str) -> str | None:
    """Why this model's, or this rank's, linears cannot be quantised to `form`; None: they can."""
    if form == "none":
        return None
    if config.experts:
        return "experts (Mixtral) cannot be quantised yet"
    grain = _GRAINS[form]
    for name, shape in config.tensor_shapes().items():
        if quantizable(name) and (shape[0] % 16 or shape[1] % grain):
            return (
                f"{name} has shape {shape}; {form} weights need rows in multiples of 16 and "
                f"columns in multiples of {grain}"
            )
    return None
