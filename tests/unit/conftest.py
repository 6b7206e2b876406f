"""Small generated checkpoints of the Llama architecture, for tests of models and engines."""

from __future__ import annotations

import json
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
    from safetensors.torch import save_file
    from tandem_runtime.checkpoint.config_json import config_from_json

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        config = TINY | changes
        (folder / "config.json").write_text(json.dumps(config))
        random = torch.Generator().manual_seed(seed)
        # Wide enough that attention is peaked and every token depends on the whole context.
        shapes = config_from_json(config, ()).tensor_shapes()
        tensors = {
            name: torch.randn(shape, generator=random) * 2.0 / shape[1] ** 0.5
            for name, shape in shapes.items()
            if len(shape) == 2
        }
        for name, shape in shapes.items():
            if len(shape) == 1:
                noise = torch.randn(shape, generator=random)
                tensors[name] = noise if name.endswith("bias") else 1.0 + 0.2 * noise
        save_file(
            {name: tensor.to(dtype) for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
        return folder

    return make
