"""A model's shape from a GGUF header. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tandem_runtime.checkpoint.config import ModelConfig, Taker, refuse_unknown
from tandem_runtime.checkpoint.errors import ModelError

_GGUF_ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Mistral and Mixtral call themselves llama there."""
_GGUF_KEYS: Final = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "vocab_size", "expert_count", "expert_used_count",
}  # fmt: skip
_GGUF_NEUTRAL: Final = {"rope.scaling.type": "none"}
"""Keys that are understood with this one value."""


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """The configuration that a GGUF header describes.

    Args:
        metadata: `GgufHeader.metadata`.
        shapes: of the file's tensors by their ggml names; which there are says what it has.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        raise ModelError(
            "UnsupportedArchitecture",
            f"GGUF architecture {architecture!r} is not supported; supported: "
            f"{', '.join(_GGUF_ARCHITECTURES)}",
        )
    prefix = f"{architecture}."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    refuse_unknown(values, _GGUF_KEYS, _GGUF_NEUTRAL, prefix)
    take = Taker(values, prefix)
    heads = take.integer("attention.head_count")
    hidden = take.integer("embedding_length")
    head_dim = take.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if take.integer(key, head_dim) != head_dim:
            raise ModelError("BadConfig", f"{prefix}{key} is {values[key]}, head_dim {head_dim}")
    experts = int(take.number("expert_count", 0))
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return ModelConfig(
        architecture="MixtralForCausalLM" if experts else _GGUF_ARCHITECTURES[architecture],
        layers=take.integer("block_count"),
        hidden=hidden,
        intermediate=take.integer("feed_forward_length"),
        heads=heads,
        kv_heads=take.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=shapes["token_embd.weight"][0],
        context_tokens=take.integer("context_length"),
        rms_eps=take.number("attention.layer_norm_rms_epsilon"),
        rope_theta=take.number("rope.freq_base", 10000.0),
        rope_scaling=None,
        tied_embeddings="output.weight" not in shapes,
        eos_token_ids=tuple(sorted({token for token in eos if isinstance(token, int)})),
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm=architecture == "qwen3",
        experts=experts,
        experts_per_token=take.integer("expert_used_count") if experts else 0,
    )
