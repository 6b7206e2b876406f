"""Weights, one tensor at a time: read, dequantised, in the dtype and layout models compute in.

Nothing is kept: whoever builds a model asks for each tensor once, in the order of the layers, so
the peak is the model itself plus one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import gguf.quants
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.gguf_header import GgufTensor
from tandem_runtime.checkpoint.open import ROPE_FACTORS, Checkpoint
from tandem_runtime.checkpoint.safetensors_header import SafeTensor

_PIECE_BYTES = 1 << 26


class Weights(Protocol):
    """A checkpoint's tensors, by Hugging Face name."""

    def load(self, name: str) -> Tensor:
        """A new tensor on the CPU, in the dtype that the weights were opened with."""

    def rope_factors(self) -> Tensor | None:
        """`ROPE_FACTORS` in float32, where the checkpoint has them."""


def open_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Weights:
    """The tensors of a checkpoint as `dtype`."""
    if checkpoint.format == "gguf":
        return GgufWeights(checkpoint, dtype)
    return SafetensorsWeights(checkpoint, dtype)


class GgufWeights:
    """Tensors of a GGUF file, dequantised by the `gguf` package."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        assert checkpoint.gguf is not None
        self._interleaved = checkpoint.gguf.metadata["general.architecture"] == "llama"
        self._bytes = np.memmap(checkpoint.path, dtype=np.uint8, mode="r")

    def load(self, name: str) -> Tensor:
        config = self._checkpoint.config
        tensor = self._dequantised(name, self._dtype)
        # ggml's converter interleaves the halves of each head for its own rope (rows 0, D/2, 1,
        # D/2 + 1, ...); models here rotate halves, as Hugging Face checkpoints do.
        # Only for llama: the Qwens' rope is on halves there too.
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            heads = config.heads if "q_proj" in name else config.kv_heads
            pairs = tensor.view(heads, config.head_dim // 2, 2, -1)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def rope_factors(self) -> Tensor | None:
        if ROPE_FACTORS not in self._checkpoint.tensors:
            return None
        return self._dequantised(ROPE_FACTORS, torch.float32)

    def _dequantised(self, name: str, dtype: torch.dtype) -> Tensor:
        entry = self._checkpoint.tensors[name]
        assert isinstance(entry, GgufTensor)
        raw = self._bytes[entry.offset : entry.offset + entry.nbytes]
        rows = raw.reshape(entry.elements // entry.shape[-1], -1)
        out = torch.empty(entry.shape, dtype=dtype).view(rows.shape[0], -1)
        try:
            for start, end in _pieces(rows.shape[0], entry.shape[-1] * 4):
                piece = gguf.quants.dequantize(rows[start:end], entry.type)
                # The package returns a read-only view of weights that are float32 already.
                out[start:end] = torch.from_numpy(np.require(piece, np.float32, ["C", "W"]))
        except NotImplementedError:
            raise ModelError(
                "BadConfig",
                f"{self._checkpoint.path}: tensor {name} is of ggml type {entry.type.name}, which "
                "the gguf package cannot dequantise; use another quantisation of this model",
            ) from None
        return out.view(entry.shape)


def _pieces(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(_PIECE_BYTES // row_bytes, 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class SafetensorsWeights:
    """Tensors of safetensors shards; one shard is open at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._open: tuple[Path, AbstractContextManager[Any], Any] | None = None

    def load(self, name: str) -> Tensor:
        entry = self._checkpoint.tensors[name]
        assert isinstance(entry, SafeTensor)
        try:
            tensor: Tensor = self._shard(entry.path).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(
                "WeightsCorrupt", f"{entry.path} cannot be read: {error}. Fetch the file again."
            ) from error
        return tensor.to(self._dtype, copy=True)

    def rope_factors(self) -> Tensor | None:
        return None

    def _shard(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            if self._open is not None:
                self._open[1].__exit__(None, None, None)
            context: AbstractContextManager[Any] = safe_open(path, framework="pt")
            self._open = (path, context, context.__enter__())
        return self._open[2]
