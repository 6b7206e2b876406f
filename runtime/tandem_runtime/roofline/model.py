"""What one token costs a model: parameters that it passes, KV bytes that it leaves behind.

Either of a config.json that Tandem serves, or of the few numbers that the arithmetic needs, so that
a model which nobody can download can be planned for too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.checkpoint.config_json import config_from_json
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.model.sharding import sizes_that_fit
from tandem_runtime.roofline.errors import RooflineError

WEIGHT_BYTES: Final = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5625}
"""Of one parameter; int4 with a 16-bit scale for each 32 of them."""
KV_BYTES: Final = {"bf16": 2.0, "fp8": 1.0}
_ACTIVATION_BYTES: Final = 2.0
_MAX_TENSOR_PARALLEL: Final = 1024


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model, as the arithmetic sees it."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    shared_params: float
    """Matrices that every token passes, without experts, embedding and head."""
    expert_params: float
    """Of all experts of all layers together."""
    experts: int
    experts_per_token: int
    embedding_params: float
    """Looked up, not multiplied; 0 where it is the head's matrix."""
    head_params: float
    """Multiplied only where a token is sampled; stays bf16 in quantised checkpoints."""
    context_tokens: int | None
    tensor_parallel_sizes: tuple[int, ...]
    """Numbers of GPUs that can share it."""

    @property
    def total_params(self) -> float:
        return self.shared_params + self.expert_params + self.embedding_params + self.head_params

    @property
    def active_params(self) -> float:
        """That one sampled token is multiplied with."""
        return self.layer_params + self.head_params

    @property
    def layer_params(self) -> float:
        """That each token of a prompt is multiplied with."""
        return self.shared_params + self.expert_params * self.expert_share(1)

    def expert_share(self, tokens: float) -> float:
        """The share of the experts that a step of so many tokens reads; routing as if by chance.

        1 - (1 - k/E)^tokens
        """
        if not self.experts:
            return 0.0
        missed: float = (1.0 - self.experts_per_token / self.experts) ** tokens
        return 1.0 - missed

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_values(self) -> int:
        """That one token leaves in the cache: a key and a value for each layer and kv head."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ServedModel:
    """A model in the number formats that it is served in."""

    shape: ModelShape
    weights: str = "bf16"
    kv_cache: str = "bf16"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_BYTES:
            raise RooflineError(f"weights {self.weights!r} is none of {', '.join(WEIGHT_BYTES)}")
        if self.kv_cache not in KV_BYTES:
            raise RooflineError(f"KV cache {self.kv_cache!r} is none of {', '.join(KV_BYTES)}")

    @property
    def weight_bytes(self) -> float:
        """All weights; embedding and head in bf16."""
        shape = self.shape
        layers = (shape.shared_params + shape.expert_params) * self.param_bytes
        return layers + (shape.embedding_params + shape.head_params) * _ACTIVATION_BYTES

    @property
    def param_bytes(self) -> float:
        """Of one parameter of a layer."""
        return WEIGHT_BYTES[self.weights]

    def read_bytes(self, tokens: float) -> float:
        """Weights that a step of so many tokens streams from memory, each once."""
        shape = self.shape
        layers = shape.shared_params + shape.expert_params * shape.expert_share(tokens)
        return layers * self.param_bytes + shape.head_params * _ACTIVATION_BYTES

    @property
    def kv_token_bytes(self) -> float:
        return self.shape.kv_values * KV_BYTES[self.kv_cache]


def read_model(path: Path) -> ModelShape:
    """The model of a config.json, or of the folder that holds it. Raises RooflineError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RooflineError(f"{file} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise RooflineError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RooflineError(f"{file} holds no JSON object, so it is no config.json")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return model_from_json(values, name)


def model_from_json(values: Mapping[str, Any], name: str) -> ModelShape:
    """The model that a config.json describes. Raises RooflineError."""
    try:
        return model_from_config(config_from_json(values, ()), name)
    except ModelError as error:
        raise RooflineError(error.message) from error


def model_from_config(config: ModelConfig, name: str) -> ModelShape:
    """Parameters counted tensor by tensor, as the runtime would load them."""
    shared = experts = 0
    for tensor, dimensions in config.tensor_shapes().items():
        if tensor.startswith("model.layers."):
            if ".experts." in tensor:
                experts += math.prod(dimensions)
            else:
                shared += math.prod(dimensions)
    head = config.vocab_size * config.hidden
    return ModelShape(
        name=name,
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        shared_params=shared,
        expert_params=experts,
        experts=config.experts,
        experts_per_token=config.experts_per_token,
        embedding_params=0 if config.tied_embeddings else head,
        head_params=head,
        context_tokens=config.context_tokens,
        tensor_parallel_sizes=tuple(sizes_that_fit(config)),
    )


def model_from_numbers(
    *,
    params: float,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    active_params: float | None = None,
    experts: int = 0,
    experts_per_token: int = 0,
    name: str = "model",
) -> ModelShape:
    """A model of which only its numbers are known. Raises RooflineError.

    Where fewer parameters are active than there are, the rest are experts: with k of E active,
    experts = (params - active) / (1 - k/E).
    """
    active = params if active_params is None else active_params
    _check_numbers(params, active, heads, kv_heads, experts, experts_per_token)
    expert_params = 0.0
    if active < params:
        expert_params = (params - active) / (1.0 - experts_per_token / experts)
        if expert_params > params:
            raise RooflineError(
                f"{experts_per_token} of {experts} experts would make at least "
                f"{params * experts_per_token / experts:.3g} parameters active, more than "
                f"{active:.3g}: give fewer experts a token, or more active parameters"
            )
    sizes = range(1, _MAX_TENSOR_PARALLEL + 1)
    return ModelShape(
        name=name,
        layers=layers,
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        shared_params=params - expert_params,
        expert_params=expert_params,
        experts=experts if expert_params else 0,
        experts_per_token=experts_per_token if expert_params else 0,
        embedding_params=0.0,
        head_params=0.0,
        context_tokens=None,
        tensor_parallel_sizes=tuple(
            size
            for size in sizes
            if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
        ),
    )


def _check_numbers(
    params: float, active: float, heads: int, kv_heads: int, experts: int, experts_per_token: int
) -> None:
    if min(heads, kv_heads) < 1 or not 0 < params < math.inf or not active > 0:
        raise RooflineError("a model has more than 0 parameters, heads and kv heads")
    if heads % kv_heads:
        raise RooflineError(f"{heads} heads cannot share {kv_heads} kv heads evenly")
    if active > params:
        raise RooflineError(f"{active:.3g} active parameters are more than all {params:.3g}")
    if active < params and not 0 < experts_per_token < experts:
        raise RooflineError(
            f"of {params:.3g} parameters {active:.3g} are active: say how many experts there are "
            "and how many a token passes (--experts, --experts-per-token)"
        )
