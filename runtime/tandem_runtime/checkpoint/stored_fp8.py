"""Checkpoints whose linears are stored in fp8 already, as their config.json tells. No torch.

    compressed-tensors   a scale for each row (channel), block or tensor       X.weight_scale
    fbgemm_fp8           a scale for each row, activations bounded             X.weight_scale
    fp8                  a scale for each block of 128 x 128, or for a tensor  X.weight_scale(_inv)

Which linears are, the tensors' dtypes tell; lists of layers to leave out need no reading. Scales of
activations are not used: they are computed for each token, which is at least as exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Final

from tandem_runtime.checkpoint.errors import ModelError

WORKING: Final = (
    "compressed-tensors (fp8 weights and activations, by channel, tensor or block), fbgemm_fp8 and "
    "fp8 (by tensor or in blocks of 128 x 128)"
)
FP8_DTYPE: Final = "F8_E4M3"
BLOCK: Final = 128
_UNUSED: Final = (".input_scale", ".input_scale_ub", ".activation_scale")


@dataclass(frozen=True)
class StoredFp8:
    """How a checkpoint stores fp8."""

    method: str
    suffix: str
    """Of the tensor of scales, after its weight's name without `weight`."""
    blocks: bool = False
    """A scale for each `BLOCK` x `BLOCK` weights; else for each row, or one."""
    bound: float = inf
    """Of activations, see kernels/fp8_quantize.py."""

    @property
    def form(self) -> str:
        """As `quantization.misfit` names it."""
        return "fp8 in blocks" if self.blocks else "fp8"

    def scales_of(self, weight: str) -> str:
        """The name of a weight's scales."""
        return weight.removesuffix("weight") + self.suffix

    def weight_of(self, name: str) -> str | None:
        """The weight whose scales a tensor would be."""
        return name.removesuffix(self.suffix) + "weight" if name.endswith(self.suffix) else None

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What the scales of a weight of this shape may look like."""
        if self.blocks:
            return [(-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))]
        return [(shape[0], 1), (shape[0],), (1,), (1, 1), ()]


def is_unused(name: str) -> bool:
    """Whether a tensor is a scale of activations."""
    return name.endswith(_UNUSED)


def stored_fp8(config: Mapping[str, Any]) -> StoredFp8 | None:
    """What a config.json says; None: nothing is quantised. Raises `ModelError` by name."""
    said = config.get("quantization_config") or config.get("compression_config")
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise _refusal(repr(said))
    method = str(said.get("quant_method"))
    if method == "fbgemm_fp8":
        bound = float(said.get("activation_scale_ub") or inf)
        return StoredFp8(method, "weight_scale", bound=bound)
    if method == "fp8":
        size = said.get("weight_block_size")
        if said.get("fmt", "e4m3") != "e4m3" or size not in (None, [BLOCK, BLOCK]):
            raise _refusal(f"fp8 with fmt {said.get('fmt')} and weight_block_size {size}")
        return StoredFp8(method, "weight_scale_inv" if size else "weight_scale", blocks=bool(size))
    if method == "compressed-tensors":
        return _compressed_tensors(said)
    raise _refusal(method)


def _compressed_tensors(said: Mapping[str, Any]) -> StoredFp8:
    groups = list((said.get("config_groups") or {}).values())
    changes = [k for k in ("kv_cache_scheme", "sparsity_config", "transform_config") if said.get(k)]
    if changes or not groups:
        raise _refusal(f"compressed-tensors with {', '.join(changes) or 'no config_groups'}")
    strategies = set()
    for group in groups:
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        for what in (weights, inputs):
            if (what.get("type"), what.get("num_bits")) != ("float", 8):
                kinds = f"weights {_kind(weights)} and activations {_kind(inputs)}"
                raise _refusal(f"compressed-tensors with {kinds}")
        strategies.add(str(weights.get("strategy")))
        if strategies == {"block"} and weights.get("block_structure") not in ([BLOCK, BLOCK], None):
            raise _refusal(f"compressed-tensors with blocks of {weights['block_structure']}")
    if strategies != {"block"} and not strategies <= {"channel", "tensor"}:
        raise _refusal(f"compressed-tensors by {', '.join(sorted(strategies))}")
    blocks = strategies == {"block"}
    return StoredFp8("compressed-tensors", "weight_scale", blocks=blocks)


def _kind(what: Mapping[str, Any]) -> str:
    return f"{what.get('type')}{what.get('num_bits')}" if what else "as they are"


def _refusal(what: str) -> ModelError:
    return ModelError(
        "BadConfig",
        f"config.json: weights quantised by {what} cannot be loaded; these can: {WORKING}. "
        "Or take the model's bfloat16 weights and set quantization.weights",
    )
