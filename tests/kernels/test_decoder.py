"""Whole models through the kernels: the same logits as transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tandem_runtime import kernels
from tandem_runtime.checkpoint.config_json import config_from_json
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.quantize import quantize
from tandem_runtime.model.weights import open_weights

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MODELS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_transformers(
    model: str, tmp_path: Path, device: torch.device, random: torch.Generator
) -> None:
    from transformers import AutoModelForCausalLM

    config = TINY | MODELS[model]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = config_from_json(config, ()).tensor_shapes()
    tensors = {n: torch.randn(s, generator=random) / s[-1] ** 0.5 for n, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.randint(0, 61, (21,), generator=random)
    with torch.inference_mode():
        ours = logits(tmp_path, ids, device)
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        theirs = oracle(ids[None]).logits[0]
    assert float((ours.cpu() - theirs).abs().max() / theirs.std()) < 1e-4


@pytest.mark.parametrize(("form", "off"), [("fp8", 0.2), ("int8", 1e-4), ("int4", 1e-4)])
def test_quantised_logits_are_those_of_what_the_weights_stand_for(
    form: str, off: float, tmp_path: Path, device: torch.device, random: torch.Generator
) -> None:
    from transformers import AutoModelForCausalLM

    config = TINY | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"hidden_size": 64, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = config_from_json(config, ()).tensor_shapes()
    tensors = {n: torch.randn(s, generator=random) / s[-1] ** 0.5 for n, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.randint(0, 61, (21,), generator=random)
    with torch.inference_mode():
        ours = logits(tmp_path, ids, device, form)
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        stored = {n: quantize(t, form).dequantized() for n, t in tensors.items() if "_proj" in n}
        oracle.load_state_dict(stored, strict=False)
        theirs = oracle(ids[None]).logits[0]
    # With fp8 the activations are rounded too.
    assert float((ours.cpu() - theirs).abs().max() / theirs.std()) < off


def logits(
    path: Path, ids: torch.Tensor, device: torch.device, quantization: str = "none"
) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    weights = open_weights(checkpoint, torch.float32)
    model = Decoder(config, weights, 64, device, quantization=quantization)
    step = Step([len(ids)], [len(ids)], [[1, 2]], 16)
    work = kernels.plan_attention(
        step,
        heads=config.heads,
        kv_heads=config.kv_heads,
        device=device,
        dtype=torch.float32,
    )
    shape = (config.layers, 2, 3, config.kv_heads, 16, config.head_dim)
    cache = torch.zeros(shape, device=device)
    at = torch.arange(len(ids), device=device)
    return model.forward(ids.to(device), at, at + 16, cache, work, at)
