"""A model's shape, from a GGUF header or a config.json. No torch.

What Tandem does not know it refuses: a key that it ignored could change what the model computes,
and a wrong token stream looks like a right one. Refused with the key and its value, so that whoever
knows it to be harmless can remove it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tandem_runtime.checkpoint.errors import ModelError

SUPPORTED_ARCHITECTURES: Final = ("LlamaForCausalLM",)
SUPPORTED_GGUF_ARCHITECTURES: Final = ("llama",)


@dataclass(frozen=True)
class Llama3Rope:
    """Rope frequencies stretched for long contexts, as Llama 3.1 does it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama architecture."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    rms_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelError(
                "BadConfig", f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError("BadConfig", f"head_dim is {self.head_dim}; rope needs an even number")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight that the model must have, by its Hugging Face name."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}.weight": s for name, s in layer.items()}
        return shapes


# -- GGUF ------------------------------------------------------------------------------------------
_GGUF_KEYS: Final = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "vocab_size",
}  # fmt: skip
_GGUF_NEUTRAL: Final = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}
"""Keys that are understood with this one value."""


def config_from_gguf(
    metadata: Mapping[str, Any], *, vocab_size: int, tied_embeddings: bool
) -> ModelConfig:
    """The configuration that a GGUF header describes.

    Args:
        metadata: `GgufHeader.metadata`.
        vocab_size: rows of `token_embd.weight`.
        tied_embeddings: whether the file has no `output.weight`.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_GGUF_ARCHITECTURES:
        raise ModelError(
            "UnsupportedArchitecture",
            f"GGUF architecture {architecture!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_GGUF_ARCHITECTURES)}",
        )
    prefix = f"{architecture}."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    _refuse_unknown(values, _GGUF_KEYS, _GGUF_NEUTRAL, prefix)
    take = _Taker(values, prefix)
    heads = take.integer("attention.head_count")
    hidden = take.integer("embedding_length")
    head_dim = take.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if take.integer(key, head_dim) != head_dim:
            raise ModelError("BadConfig", f"{prefix}{key} is {values[key]}, head_dim {head_dim}")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return ModelConfig(
        architecture="LlamaForCausalLM",
        layers=take.integer("block_count"),
        hidden=hidden,
        intermediate=take.integer("feed_forward_length"),
        heads=heads,
        kv_heads=take.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_tokens=take.integer("context_length"),
        rms_eps=take.number("attention.layer_norm_rms_epsilon"),
        rope_theta=take.number("rope.freq_base", 10000.0),
        rope_scaling=None,
        tied_embeddings=tied_embeddings,
        eos_token_ids=tuple(sorted({token for token in eos if isinstance(token, int)})),
    )


# -- config.json -----------------------------------------------------------------------------------
_JSON_KEYS: Final = {
    "architectures", "num_hidden_layers", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "eos_token_id",
}  # fmt: skip
_JSON_NEUTRAL: Final = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1,
    "rope_interleaved": False,
}  # fmt: skip
_JSON_HARMLESS: Final = {
    "_name_or_path", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout",
    "is_llama_config", "transformers.js_config", "max_length", "do_sample",
    "temperature", "top_p", "_attn_implementation_autoset",
}  # fmt: skip
"""Keys of training, generation defaults and provenance."""
_ROPE_KEYS: Final = {
    "type", "rope_type", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip


def config_from_json(config: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """The configuration that a config.json describes.

    Args:
        config: its object.
        eos_token_ids: from generation_config.json, where there is one; else empty.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not set(names) & set(SUPPORTED_ARCHITECTURES):
        raise ModelError(
            "UnsupportedArchitecture",
            f"architecture {', '.join(map(str, names)) or 'unknown'} is not supported; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}",
        )
    _refuse_unknown(config, _JSON_KEYS | _JSON_HARMLESS, _JSON_NEUTRAL, "config.json: ")
    take = _Taker(config, "config.json: ")
    heads, hidden = take.integer("num_attention_heads"), take.integer("hidden_size")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", None) or take.number("rope_theta", 10000.0)
    eos = config.get("eos_token_id")
    from_config = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    return ModelConfig(
        architecture=SUPPORTED_ARCHITECTURES[0],
        layers=take.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=take.integer("intermediate_size"),
        heads=heads,
        kv_heads=take.integer("num_key_value_heads", heads),
        head_dim=take.integer("head_dim", hidden // heads),
        vocab_size=take.integer("vocab_size"),
        context_tokens=take.integer("max_position_embeddings"),
        rms_eps=take.number("rms_norm_eps"),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(sorted(eos_token_ids or from_config)),
    )


def _rope_scaling(rope: dict[str, Any]) -> Llama3Rope | None:
    _refuse_unknown(rope, _ROPE_KEYS, {}, "config.json: rope_scaling.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(
            "BadConfig", f"rope scaling of type {kind!r} is not supported; supported: llama3"
        )
    take = _Taker(rope, "config.json: rope_scaling.")
    return Llama3Rope(
        factor=take.number("factor"),
        low_freq_factor=take.number("low_freq_factor"),
        high_freq_factor=take.number("high_freq_factor"),
        original_context_tokens=take.integer("original_max_position_embeddings"),
    )


# -- both ------------------------------------------------------------------------------------------
def _refuse_unknown(
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


class _Taker:
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
