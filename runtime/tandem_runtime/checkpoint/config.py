"""A model's shape, and how it is read from a GGUF header or a config.json. No torch.

What Tandem does not know it refuses: a key that it ignored could change what the model computes,
and a wrong token stream looks like a right one. Refused with the key and its value, so that whoever
knows it to be harmless can remove it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tandem_runtime.checkpoint.errors import ModelError

MLP_NAMES: Final = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ROUTER: Final = "block_sparse_moe.gate"


def expert_names(index: int) -> tuple[str, str, str]:
    """An expert's projections within its layer: gate, up, down."""
    prefix = f"block_sparse_moe.experts.{index}."
    return f"{prefix}w1", f"{prefix}w3", f"{prefix}w2"


@dataclass(frozen=True)
class Llama3Rope:
    """Rope frequencies stretched for long contexts, as Llama 3.1 does it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: Llama's, and what its siblings add as options."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    """Positions it was trained for, at most its attention's window."""
    rms_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of query and key, before rope."""
    experts: int = 0
    """Expert MLPs in each layer, of which a router picks; 0: one MLP for all tokens."""
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                "BadConfig", f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError("BadConfig", f"head_dim is {self.head_dim}; rope needs an even number")
        if self.experts_per_token > self.experts:
            raise ModelError(
                "BadConfig", f"{self.experts_per_token} experts a token of {self.experts} experts"
            )

    def limit_context(self, max_context_tokens: int | None) -> int:
        """The context to serve, where at most `max_context_tokens` are asked for.

        Raises:
            ModelError: more are asked for than the model computes rightly.
        """
        if max_context_tokens is not None and max_context_tokens > self.context_tokens:
            raise ModelError(
                "ContextTooLong",
                f"maxContextTokens is {max_context_tokens}, but the model was made for "
                f"{self.context_tokens} (or its attention's window is that): ask for at most that",
            )
        return max_context_tokens or self.context_tokens

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight that the model must have, by its Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        layer = self._attention_shapes() | self._mlp_shapes()
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (self.hidden,)}
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{name}_proj.weight"] = (rows, self.hidden)
            if self.qkv_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        shapes["self_attn.o_proj.weight"] = (self.hidden, query)
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden,)
        return shapes

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (self.hidden,)}
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        if self.experts:
            shapes[f"{ROUTER}.weight"] = (self.experts, self.hidden)
            for index in range(self.experts):
                for name, shape in zip(expert_names(index), (wide, wide, narrow), strict=True):
                    shapes[f"{name}.weight"] = shape
            return shapes
        for name, shape in zip(MLP_NAMES, (wide, wide, narrow), strict=True):
            shapes[f"{name}.weight"] = shape
            if self.mlp_bias:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes


def refuse_unknown(
    values: Mapping[str, Any], known: set[str], neutral: Mapping[str, Any], where: str
) -> None:
    for key, value in values.items():
        if key in known or value is None:
            continue
        if key in neutral:
            if value == neutral[key]:
                continue
            raise ModelError(
                "BadConfig", f"{where}{key} is {value!r}; only {neutral[key]!r} is supported"
            )
        raise ModelError(
            "BadConfig",
            f"{where}{key} = {value!r} is unknown and could change what the model computes; "
            "remove the key if it does not",
        )


class Taker:
    """Takes numbers out of a mapping, with a sentence for what is missing or of another kind."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError("BadConfig", f"{self._where}{key} is {value!r}, a number is needed")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value < 1:
            raise ModelError(
                "BadConfig", f"{self._where}{key} is {value:g}, an integer of at least 1 is needed"
            )
        return int(value)
