"""The headers of a safetensors checkpoint, one file or shards: where each tensor lies. No torch.

A file is 8 bytes of header length, a JSON header, then tensor data. Reading it here, instead of
through the `safetensors` package, gives a sentence for each kind of damage and needs no torch; the
weights themselves are loaded by the package. Invariant: as in gguf_header.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from tandem_runtime.checkpoint.errors import ModelError

INDEX: Final = "model.safetensors.index.json"
DTYPE_BYTES: Final = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Dtypes of weights that can be loaded as they are; others are quantised formats."""
_BYTES: Final = DTYPE_BYTES | {"F8_E4M3": 1}
_MAX_HEADER_BYTES: Final = 100_000_000


@dataclass(frozen=True)
class SafeTensor:
    """One tensor of a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    """From the start of the file."""
    nbytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


def shard_paths(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: `path` itself, or those of the folder it names.

    Raises:
        ModelError: there is none, or one that the index names is missing.
    """
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError("WeightsCorrupt", f"{index} has no weight_map; fetch it again")
        shards = sorted({path / str(name) for name in weight_map.values()})
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ModelError(
                "WeightsMissing",
                f"{index.name} names {len(shards)} shards and {len(missing)} of them are not in "
                f"{path}: {', '.join(missing[:4])}. Fetch them.",
            )
        return shards
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ModelError("WeightsMissing", f"there is no .safetensors file in {path}")
    return shards


def read_safetensors_headers(path: Path) -> dict[str, SafeTensor]:
    """Every tensor of a checkpoint, by name; each lies inside its file."""
    tensors: dict[str, SafeTensor] = {}
    for shard in shard_paths(path):
        for tensor in _read_shard(shard):
            if tensor.name in tensors:
                raise ModelError(
                    "WeightsCorrupt",
                    f"tensor {tensor.name} is in {tensors[tensor.name].path.name} and in "
                    f"{shard.name}: keep the files of one checkpoint only",
                )
            tensors[tensor.name] = tensor
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError("WeightsMissing", f"there is no {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError("BadConfig", f"{path} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError("BadConfig", f"{path} holds no JSON object")
    return value


def _read_shard(path: Path) -> list[SafeTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(
                "WeightsCorrupt",
                f"{path} is damaged or truncated: it has {size} bytes and its header claims "
                f"{length}. Fetch the file again.",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "WeightsCorrupt",
            f"the header of {path} is damaged: {type(error).__name__}: {error}. "
            "Fetch the file again.",
        ) from error
    expected = max((t.offset + t.nbytes for t in tensors), default=8 + length)
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise ModelError(
            "WeightsCorrupt",
            f"{path} is {what}: it has {size} bytes, expected {expected}. Fetch the file again.",
        )
    return tensors


def _tensor(path: Path, name: str, entry: dict[str, Any], data_offset: int) -> SafeTensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(int(n) for n in entry["shape"]), str(entry["dtype"])
    if dtype in _BYTES and end - begin != prod(shape) * _BYTES[dtype]:
        raise ValueError(f"tensor {name} of shape {shape} and {dtype} has {end - begin} bytes")
    return SafeTensor(name, shape, dtype, path, data_offset + begin, end - begin)
