"""Checkpoints seen through their headers: complete or refused, and named by a digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tandem_runtime.checkpoint import digest
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import open_checkpoint


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(path: Path) -> tuple[str, str]:
    with pytest.raises(ModelError) as caught:
        open_checkpoint(path)
    return caught.value.reason, caught.value.message


def test_counts_of_a_whole_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    assert checkpoint.parameters == sum(t.numel() for t in tensors.values())
    assert checkpoint.weights_bytes == 4 * checkpoint.parameters
    assert checkpoint.format == "safetensors"


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert refused(folder) == (
        "WeightsCorrupt",
        f"{folder} lacks 1 of 21 tensors, the first is model.layers.1.mlp.up_proj.weight. "
        "Fetch the whole checkpoint.",
    )


def test_a_tensor_without_use_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(384)}))
    reason, message = refused(folder)
    assert reason == "BadConfig"
    assert "has the tensor model.layers.0.self_attn.q_proj.bias, which LlamaForCausalLM" in message


def test_buffers_without_effect_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: torch.zeros(32)}))
    assert name not in open_checkpoint(folder).tensors


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(65)}))
    assert refused(folder) == (
        "WeightsCorrupt",
        f"{folder}: tensor model.norm.weight has shape (65,), the configuration asks for (96,)",
    )


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(96, dtype=torch.int8)}))
    reason, message = refused(folder)
    assert reason == "BadConfig"
    assert message.endswith("is I8; weights of F64, F32, BF16, F16 can be loaded")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    reason, message = refused(tmp_path / "model.bin")
    assert reason == "UnsupportedSource"
    assert "name a .gguf file, a .safetensors file or a folder of them" in message


def test_eos_ids_come_from_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 4]}))
    assert open_checkpoint(folder).config.eos_token_ids == (4, 5)


def test_digests_name_the_weights_and_the_configuration(folder: Path) -> None:
    first = open_checkpoint(folder).digest()
    assert first == open_checkpoint(folder).digest()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    other_rope = open_checkpoint(folder).digest()
    rewrite(folder, lambda t: t["lm_head.weight"].view(-1)[70].add_(1.0))
    assert len({first, other_rope, open_checkpoint(folder).digest()}) == 3


def test_a_digest_of_samples_sees_headers_and_samples(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_checkpoint(folder).digest()
    monkeypatch.setattr(digest, "FULL_DIGEST_BYTES", 1000)
    monkeypatch.setattr(digest, "SAMPLE_BYTES", 64)
    sampled = open_checkpoint(folder).digest()
    assert sampled != whole
    rewrite(folder, lambda t: t["model.embed_tokens.weight"].view(-1)[0].add_(1.0))
    first_changed = open_checkpoint(folder).digest()
    rewrite(folder, lambda t: t["model.embed_tokens.weight"].view(-1)[-1].add_(1.0))
    last_changed = open_checkpoint(folder).digest()
    rewrite(folder, lambda t: t["model.embed_tokens.weight"].view(-1)[100].add_(1.0))
    assert len({sampled, first_changed, last_changed}) == 3
    assert open_checkpoint(folder).digest() == last_changed, "between the samples nothing is read"


def test_a_gguf_file_without_embeddings_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reason, message = refused(tmp_path / "x.gguf")
    assert reason == "WeightsCorrupt"
    assert message.endswith("has no tensor token_embd.weight")
