"""Model configurations: what is understood, and what is refused rather than ignored."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_runtime.checkpoint.config import Llama3Rope
from tandem_runtime.checkpoint.config_gguf import config_from_gguf
from tandem_runtime.checkpoint.config_json import config_from_json
from tandem_runtime.checkpoint.errors import ModelError

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
"""v0.1"""
QWEN2_5_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B: dict[str, Any] = {
    **{k: v for k, v in MISTRAL_7B.items() if k != "sliding_window"},
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
SMOLLM2_GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {"token_embd.weight": (49152, 576)}


def test_llama_3_1_is_understood() -> None:
    config = config_from_json(LLAMA_3_1_8B, ())
    assert (config.heads, config.kv_heads, config.head_dim) == (32, 8, 128)
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    shapes = config.tensor_shapes()
    assert len(shapes) == 3 + 32 * 9
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)


def test_mistral_is_served_within_its_window() -> None:
    assert config_from_json(MISTRAL_7B, ()).context_tokens == 4096
    assert config_from_json(MISTRAL_7B | {"sliding_window": None}, ()).context_tokens == 32768
    missing = {k: v for k, v in MISTRAL_7B.items() if k != "sliding_window"}
    assert config_from_json(missing, ()).context_tokens == 4096, "transformers' default"


@pytest.mark.parametrize(
    ("changes", "context_tokens"),
    [
        ({}, 32768),
        ({"use_sliding_window": True, "sliding_window": 1024}, 1024),
        ({"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 24}, 32768),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 24}, 32768),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 512,
                "layer_types": ["full_attention"] * 23 + ["sliding_attention"],
            },
            512,
        ),
    ],
)
def test_a_window_of_qwen2_counts_where_a_layer_uses_it(
    changes: dict[str, Any], context_tokens: int
) -> None:
    config = config_from_json(QWEN2_5_0_5B | changes, ())
    assert config.context_tokens == context_tokens
    assert config.tensor_shapes()["model.layers.0.self_attn.k_proj.bias"] == (128,)
    assert "model.layers.0.self_attn.o_proj.bias" not in config.tensor_shapes()


def test_qwen3_is_understood() -> None:
    config = config_from_json(QWEN3_0_6B, ())
    shapes = config.tensor_shapes()
    assert shapes["model.layers.27.self_attn.q_proj.weight"] == (2048, 1024)
    assert shapes["model.layers.27.self_attn.k_norm.weight"] == (128,)
    assert "model.layers.0.self_attn.q_proj.bias" not in shapes
    assert config.context_tokens == 40960


def test_mixtral_is_understood() -> None:
    config = config_from_json(MIXTRAL_8X7B, ())
    shapes = config.tensor_shapes()
    assert (config.experts, config.experts_per_token) == (8, 2)
    assert shapes["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    assert "model.layers.0.mlp.gate_proj.weight" not in shapes
    assert sum(a * b for a, b in (s for s in shapes.values() if len(s) == 2)) > 46e9
    with pytest.raises(ModelError, match="9 experts a token of 8 experts"):
        config_from_json(MIXTRAL_8X7B | {"num_experts_per_tok": 9}, ())


def test_what_one_architecture_knows_another_refuses() -> None:
    with pytest.raises(ModelError, match="num_local_experts = 8 is unknown"):
        config_from_json(MISTRAL_7B | {"num_local_experts": 8}, ())
    with pytest.raises(ModelError, match="attention_bias is True; only False is supported"):
        config_from_json(QWEN2_5_0_5B | {"attention_bias": True}, ())


def test_rope_parameters_of_newer_files_are_understood() -> None:
    new = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert config_from_json(new, ()) == config_from_json(LLAMA_3_1_8B, ())


def test_eos_of_the_generation_config_goes_first() -> None:
    assert config_from_json(LLAMA_3_1_8B, (7,)).eos_token_ids == (7,)


def test_smollm2_is_understood() -> None:
    config = config_from_gguf(SMOLLM2_GGUF, SHAPES)
    assert (config.head_dim, config.layers, config.rope_theta) == (64, 30, 100000.0)
    assert config.eos_token_ids == (2,)
    assert "lm_head.weight" not in config.tensor_shapes()


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        pytest.param(
            {"architectures": ["GPT2LMHeadModel"]},
            "UnsupportedArchitecture",
            "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM",
            id="architecture",
        ),
        pytest.param(
            {"architectures": None},
            "UnsupportedArchitecture",
            "architecture unknown is not supported; supported: LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM",
            id="no architecture",
        ),
        pytest.param(
            {"sliding_window": 4096},
            "BadConfig",
            "config.json: sliding_window = 4096 is unknown and could change what the model "
            "computes; remove the key if it does not",
            id="unknown key",
        ),
        pytest.param(
            {"hidden_act": "gelu"},
            "BadConfig",
            "config.json: hidden_act is 'gelu'; only 'silu' is supported",
            id="other value",
        ),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "BadConfig",
            "rope scaling of type 'yarn' is not supported; supported: llama3",
            id="rope",
        ),
        pytest.param(
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "BadConfig",
            "config.json: rope_scaling.partial_rotary_factor = 0.5 is unknown and could change "
            "what the model computes; remove the key if it does not",
            id="rope key",
        ),
        pytest.param(
            {"hidden_size": None},
            "BadConfig",
            "config.json: hidden_size is None, a number is needed",
            id="missing",
        ),
        pytest.param(
            {"num_attention_heads": 0},
            "BadConfig",
            "config.json: num_attention_heads is 0, an integer of at least 1 is needed",
            id="zero",
        ),
        pytest.param(
            {"num_key_value_heads": 5},
            "BadConfig",
            "32 heads cannot share 5 kv heads evenly",
            id="groups",
        ),
        pytest.param(
            {"head_dim": 65}, "BadConfig", "head_dim is 65; rope needs an even number", id="odd"
        ),
    ],
)
def test_a_config_json_that_cannot_be_served_is_refused(
    changes: dict[str, Any], reason: str, sentence: str
) -> None:
    with pytest.raises(ModelError) as caught:
        config_from_json(LLAMA_3_1_8B | changes, ())
    assert (caught.value.reason, caught.value.message) == (reason, sentence)


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        pytest.param(
            {"general.architecture": "gemma3"},
            "UnsupportedArchitecture",
            "GGUF architecture 'gemma3' is not supported; supported: llama, qwen2, qwen3",
            id="architecture",
        ),
        pytest.param(
            {"llama.expert_count": 8},
            "BadConfig",
            "llama.expert_used_count is None, a number is needed",
            id="experts",
        ),
        pytest.param(
            {"llama.rope.scaling.type": "yarn"},
            "BadConfig",
            "llama.rope.scaling.type is 'yarn'; only 'none' is supported",
            id="rope",
        ),
        pytest.param(
            {"llama.attention.sliding_window": 512},
            "BadConfig",
            "llama.attention.sliding_window = 512 is unknown and could change what the model "
            "computes; remove the key if it does not",
            id="unknown key",
        ),
        pytest.param(
            {"llama.rope.dimension_count": 32},
            "BadConfig",
            "llama.rope.dimension_count is 32, head_dim 64",
            id="partial rope",
        ),
    ],
)
def test_a_gguf_header_that_cannot_be_served_is_refused(
    changes: dict[str, Any], reason: str, sentence: str
) -> None:
    with pytest.raises(ModelError) as caught:
        config_from_gguf(SMOLLM2_GGUF | changes, SHAPES)
    assert (caught.value.reason, caught.value.message) == (reason, sentence)
