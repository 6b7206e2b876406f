"""GGUF files made from a small checkpoint, as llama.cpp's converter makes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def ggml_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    rest, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


def with_stacked_experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """By ggml name; the experts of a layer as one tensor."""
    parts: dict[str, list[Any]] = {}
    for name in sorted(tensors):
        expert = re.fullmatch(r"model\.layers\.(\d+)\..*experts\.\d\.(w\d)\.weight", name)
        if expert:
            key = f"blk.{expert[1]}.{EXPERTS[expert[2]]}.weight"
            parts.setdefault(key, []).append(tensors.pop(name))
    return {ggml_name(name): t for name, t in tensors.items()} | {
        name: np.stack(experts) for name, experts in parts.items()
    }


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What convert_hf_to_gguf.py does to q and k (`LlamaModel.permute`)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="session")
def to_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`to_gguf(folder, config, type, metadata, rope_factors)`: a .gguf file of that checkpoint."""

    def make(
        folder: Path,
        config: dict[str, Any],
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        metadata: dict[str, int | float | str] | None = None,
        rope_factors: np.ndarray[Any, Any] | None = None,
        architecture: str = "llama",
    ) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_eos_token_id(2)
        writer.add_token_list(["a", "b", "ü"])
        for key, value in (metadata or {}).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)  # type: ignore[operator]
        if "num_local_experts" in config:
            writer.add_expert_count(config["num_local_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
        tensors = load_file(folder / "model.safetensors")
        if architecture == "llama":
            for name, weight in tensors.items():
                if "q_proj" in name or "k_proj" in name:
                    tensors[name] = interleave(weight, heads if "q_proj" in name else kv_heads)
        for name, weight in with_stacked_experts(tensors).items():
            if weight.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
                writer.add_tensor(name, weight.astype(np.float32))
            else:
                writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        if rope_factors is not None:
            writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
