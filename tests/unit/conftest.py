"""Small generated checkpoints of the Llama architecture, for tests of models and engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import to_gguf  # noqa: F401 (a fixture)

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(**changes_to_config)`: a folder with config.json and random weights."""
    import torch
    from tandem_runtime.checkpoint.tiny import random_weights, write_checkpoint

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        config = TINY | changes
        write_checkpoint(folder, config, random_weights(config, seed), dtype)
        return folder

    return make
