"""Reading safetensors headers, whole and sharded; a sentence for each kind of damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.safetensors_header import INDEX, read_json, read_safetensors_headers


def sharded(folder: Path) -> Path:
    for index in (1, 2):
        tensors = {f"t{index}": torch.full((2, 3), float(index)), f"u{index}": torch.zeros(index)}
        save_file(tensors, folder / f"model-{index}.safetensors", metadata={"format": "pt"})
    weight_map = {f"{k}{i}": f"model-{i}.safetensors" for i in (1, 2) for k in "tu"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refused(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_safetensors_headers(path)
    return caught.value


def test_tensors_of_all_shards_are_found(tmp_path: Path) -> None:
    tensors = read_safetensors_headers(sharded(tmp_path))
    assert sorted(tensors) == ["t1", "t2", "u1", "u2"]
    tensor = tensors["t2"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((2, 3), "F32", 24)
    raw = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert struct.unpack("<6f", raw) == (2.0,) * 6


def test_one_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    save_file({"only": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert list(read_safetensors_headers(tmp_path)) == ["only"]
    assert list(read_safetensors_headers(tmp_path / "x.safetensors")) == ["only"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    error = refused(tmp_path)
    assert error.reason == "WeightsMissing"
    assert error.message == (
        f"{INDEX} names 2 shards and 1 of them are not in {tmp_path}: model-2.safetensors. "
        "Fetch them."
    )


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.reason == "WeightsMissing"
    assert error.message == f"there is no .safetensors file in {tmp_path}"


@pytest.mark.parametrize(("cut", "what"), [(-1, "truncated"), (1, "longer than its header says")])
def test_a_wrong_size_is_said_with_both_numbers(tmp_path: Path, cut: int, what: str) -> None:
    path = sharded(tmp_path) / "model-1.safetensors"
    content = path.read_bytes()
    size = len(content)
    path.write_bytes(content[:cut] if cut < 0 else content + b"x" * cut)
    error = refused(tmp_path)
    assert error.reason == "WeightsCorrupt"
    assert error.message == (
        f"{path} is {what}: it has {size + cut} bytes, expected {size}. Fetch the file again."
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 4) + b"{no}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 61) + b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    ],
)
def test_a_damaged_header_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    error = refused(tmp_path)
    assert error.reason == "WeightsCorrupt"
    assert "Fetch the file again." in error.message


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in "xy":
        save_file({"same": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert "keep the files of one checkpoint only" in refused(tmp_path).message


@pytest.mark.parametrize(
    ("content", "reason"), [("[1]", "BadConfig"), ("{", "BadConfig"), (None, "WeightsMissing")]
)
def test_json_that_is_none_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelError) as caught:
        read_json(path)
    assert caught.value.reason == reason
