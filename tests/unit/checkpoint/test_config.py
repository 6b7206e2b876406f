"""Model configurations: what is understood, and what is refused rather than ignored."""

from __future__ import annotations

from typing import Any

import pytest
from tandem_runtime.checkpoint.config import Llama3Rope, config_from_gguf, config_from_json
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


def test_llama_3_1_is_understood() -> None:
    config = config_from_json(LLAMA_3_1_8B, ())
    assert (config.heads, config.kv_heads, config.head_dim) == (32, 8, 128)
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    shapes = config.tensor_shapes()
    assert len(shapes) == 3 + 32 * 9
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)


def test_rope_parameters_of_newer_files_are_understood() -> None:
    new = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert config_from_json(new, ()) == config_from_json(LLAMA_3_1_8B, ())


def test_eos_of_the_generation_config_goes_first() -> None:
    assert config_from_json(LLAMA_3_1_8B, (7,)).eos_token_ids == (7,)


def test_smollm2_is_understood() -> None:
    config = config_from_gguf(SMOLLM2_GGUF, vocab_size=49152, tied_embeddings=True)
    assert (config.head_dim, config.layers, config.rope_theta) == (64, 30, 100000.0)
    assert config.eos_token_ids == (2,)
    assert "lm_head.weight" not in config.tensor_shapes()


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        pytest.param(
            {"architectures": ["GPT2LMHeadModel"]},
            "UnsupportedArchitecture",
            "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM",
            id="architecture",
        ),
        pytest.param(
            {"architectures": None},
            "UnsupportedArchitecture",
            "architecture unknown is not supported; supported: LlamaForCausalLM",
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
            {"attention_bias": True},
            "BadConfig",
            "config.json: attention_bias is True; only False is supported",
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
            "GGUF architecture 'gemma3' is not supported; supported: llama",
            id="architecture",
        ),
        pytest.param(
            {"llama.expert_count": 8},
            "BadConfig",
            "llama.expert_count is 8; only 0 is supported",
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
        config_from_gguf(SMOLLM2_GGUF | changes, vocab_size=49152, tied_embeddings=True)
    assert (caught.value.reason, caught.value.message) == (reason, sentence)
