"""A model's shape from a config.json, for each architecture that is served. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tandem_runtime.checkpoint.config import Llama3Rope, ModelConfig, Taker, refuse_unknown
from tandem_runtime.checkpoint.errors import ModelError


@dataclass(frozen=True)
class _Family:
    """What one architecture adds to Llama's config.json."""

    keys: Mapping[str, Any]
    """More keys, and what transformers takes where one is missing (also of common keys)."""
    qkv_bias: bool = False
    qk_norm: bool = False


_WINDOWS: Final = {
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "layer_types": None, "num_key_value_heads": 32,
}  # fmt: skip
_FAMILIES: Final = {
    "LlamaForCausalLM": _Family({"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": _Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "Qwen2ForCausalLM": _Family(_WINDOWS, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(
        _WINDOWS | {"attention_bias": False, "head_dim": 128}, qk_norm=True
    ),
    "MixtralForCausalLM": _Family(
        {
            "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_key_value_heads": 8, "rope_theta": 1e6,
        }
    ),
}  # fmt: skip
_JSON_KEYS: Final = {
    "architectures", "num_hidden_layers", "hidden_size", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "eos_token_id", "quantization_config", "compression_config",
}  # fmt: skip
_JSON_NEUTRAL: Final = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1,
    "rope_interleaved": False,
}  # fmt: skip
_JSON_HARMLESS: Final = {
    "_name_or_path", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout",
    "is_llama_config", "transformers.js_config", "max_length", "do_sample",
    "temperature", "top_p", "_attn_implementation_autoset", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise",
}  # fmt: skip
"""Keys of training, generation defaults and provenance."""
_ROPE_KEYS: Final = {
    "type", "rope_type", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
}  # fmt: skip
_UNBOUNDED: Final = 1 << 40


def config_from_json(config: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """The configuration that a config.json describes.

    Args:
        config: its object.
        eos_token_ids: from generation_config.json, where there is one; else empty.
    """
    names = config.get("architectures")
    names = [str(name) for name in names] if isinstance(names, list) else []
    architecture = next((name for name in names if name in _FAMILIES), None)
    if architecture is None:
        raise ModelError(
            "UnsupportedArchitecture",
            f"architecture {', '.join(names) or 'unknown'} is not supported; supported: "
            f"{', '.join(_FAMILIES)}",
        )
    family = _FAMILIES[architecture]
    known = _JSON_KEYS | _JSON_HARMLESS | family.keys.keys()
    refuse_unknown(config, known, _JSON_NEUTRAL, "config.json: ")
    config = {**family.keys, **config}
    take = Taker(config, "config.json: ")
    heads, hidden = take.integer("num_attention_heads"), take.integer("hidden_size")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", None) or take.number("rope_theta", 10000.0)
    eos = config.get("eos_token_id")
    from_config = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    layers = take.integer("num_hidden_layers")
    moe = "num_local_experts" in family.keys
    attention_bias = bool(config.get("attention_bias"))
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=take.integer("intermediate_size"),
        heads=heads,
        kv_heads=take.integer("num_key_value_heads", heads),
        head_dim=take.integer("head_dim", hidden // heads),
        vocab_size=take.integer("vocab_size"),
        context_tokens=min(
            take.integer("max_position_embeddings"), _window_tokens(config, take, layers)
        ),
        rms_eps=take.number("rms_norm_eps"),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=tuple(sorted(eos_token_ids or from_config)),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")),
        qk_norm=family.qk_norm,
        experts=take.integer("num_local_experts") if moe else 0,
        experts_per_token=take.integer("num_experts_per_tok") if moe else 0,
    )


def _window_tokens(config: Mapping[str, Any], take: Taker, layers: int) -> int:
    """How far back every layer sees: within it, attention with a window is attention without."""
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return _UNBOUNDED
    kinds = config.get("layer_types")
    if kinds is None:
        slides = take.number("max_window_layers", 0) < layers
    else:
        slides = any(kind != "full_attention" for kind in kinds)
    return take.integer("sliding_window") if slides else _UNBOUNDED


def _rope_scaling(rope: dict[str, Any]) -> Llama3Rope | None:
    refuse_unknown(rope, _ROPE_KEYS, {}, "config.json: rope_scaling.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(
            "BadConfig", f"rope scaling of type {kind!r} is not supported; supported: llama3"
        )
    take = Taker(rope, "config.json: rope_scaling.")
    return Llama3Rope(
        factor=take.number("factor"),
        low_freq_factor=take.number("low_freq_factor"),
        high_freq_factor=take.number("high_freq_factor"),
        original_context_tokens=take.integer("original_max_position_embeddings"),
    )
