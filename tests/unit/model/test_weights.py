"""Weights as models get them: dequantised, un-permuted, in the dtype asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.model import weights as weights_module
from tandem_runtime.model.weights import open_weights

Kind = gguf.GGMLQuantizationType
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Kind.F32, 0.0), (Kind.F16, 1e-3), (Kind.BF16, 1e-2), (Kind.Q8_0, 1e-2), (Kind.Q4_1, 0.15)],
)
def test_gguf_weights_are_those_of_the_checkpoint_they_were_made_from(
    tiny_checkpoint: Callable[..., Path], to_gguf: Callable[..., Path], kind: Kind, error: float
) -> None:
    folder = tiny_checkpoint()
    loaded = open_weights(open_checkpoint(to_gguf(folder, CONFIG, kind)), torch.float32)
    for name, original in load_file(folder / "model.safetensors").items():
        tensor = loaded.load(name)
        assert tensor.shape == original.shape
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        difference = (tensor - original).abs().max() / original.abs().max()
        assert difference <= (0.0 if original.ndim == 1 else error), name


def test_rows_are_dequantised_in_pieces(
    tiny_checkpoint: Callable[..., Path],
    to_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = to_gguf(tiny_checkpoint(), CONFIG, Kind.Q8_0)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = open_weights(open_checkpoint(path), torch.bfloat16).load(name)
    monkeypatch.setattr(weights_module, "_PIECE_BYTES", 1000)
    assert torch.equal(open_weights(open_checkpoint(path), torch.bfloat16).load(name), whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_weights_are_converted(
    tiny_checkpoint: Callable[..., Path], stored: torch.dtype
) -> None:
    folder = tiny_checkpoint(dtype=stored)
    loaded = open_weights(open_checkpoint(folder), torch.bfloat16)
    assert loaded.rope_factors() is None
    for name, original in load_file(folder / "model.safetensors").items():
        assert torch.equal(loaded.load(name), original.to(torch.bfloat16))


def test_a_type_that_cannot_be_dequantised_is_refused_by_name(
    tiny_checkpoint: Callable[..., Path],
    to_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unsupported(*_: object) -> np.ndarray:
        raise NotImplementedError

    path = to_gguf(tiny_checkpoint(), CONFIG, Kind.Q8_0)
    monkeypatch.setattr(gguf.quants, "dequantize", unsupported)
    with pytest.raises(weights_module.ModelError, match="is of ggml type Q8_0, which the gguf"):
        open_weights(open_checkpoint(path), torch.float32).load("lm_head.weight")


def test_rope_factors_are_found(
    tiny_checkpoint: Callable[..., Path], to_gguf: Callable[..., Path]
) -> None:
    factors = np.linspace(1, 8, 32)
    path = to_gguf(tiny_checkpoint(), CONFIG, rope_factors=factors)
    found = open_weights(open_checkpoint(path), torch.float32).rope_factors()
    assert found is not None
    assert torch.equal(found, torch.from_numpy(factors).float())
