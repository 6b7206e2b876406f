"""Weights, one tensor at a time: read, dequantised, in the dtype and layout models compute in.

Nothing is kept: whoever builds a model asks for each tensor once, in the order of the layers, so
the peak is the model itself plus one tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.gguf_header import GgufTensor
from tandem_runtime.checkpoint.open import ROPE_FACTORS, Checkpoint
from tandem_runtime.checkpoint.progress import Progress
from tandem_runtime.checkpoint.safetensors_header import SafeTensor
from tandem_runtime.checkpoint.stored_fp8 import BLOCK, FP8_DTYPE
from tandem_runtime.model.quantize import Quantized

TORCH_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    FP8_DTYPE: torch.float8_e4m3fn,
}
_PIECE_BYTES = 1 << 26


class Weights(Protocol):
    """A checkpoint's tensors, by Hugging Face name."""

    @property
    def dtype(self) -> torch.dtype:
        """That models compute in."""

    def load(self, name: str) -> Tensor:
        """A new tensor on the CPU, in `dtype`."""

    def quantized(self, name: str) -> Quantized | None:
        """The same of a weight that is stored quantised, on the CPU; None: it is not."""

    def rope_factors(self) -> Tensor | None:
        """`ROPE_FACTORS` in float32, where the checkpoint has them."""


def return_freed_memory() -> None:
    """To the system: glibc keeps up to 64 MB of what was freed, more than a layer may be."""
    with suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def open_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Weights:
    """The tensors of a checkpoint as `dtype`."""
    if checkpoint.format == "gguf":
        return GgufWeights(checkpoint, dtype)
    return SafetensorsWeights(checkpoint, dtype)


class GgufWeights:
    """Tensors of a GGUF file, dequantised by the `gguf` package."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        assert checkpoint.gguf is not None
        self._interleaved = checkpoint.gguf.metadata["general.architecture"] == "llama"
        self._progress = Progress("weights", checkpoint.weights_bytes)

    def load(self, name: str) -> Tensor:
        config = self._checkpoint.config
        tensor = self._dequantised(name, self.dtype)
        # ggml's converter interleaves the halves of each head for its own rope (rows 0, D/2, 1,
        # D/2 + 1, ...); models here rotate halves, as Hugging Face checkpoints do.
        # Only for llama: the Qwens' rope is on halves there too.
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            heads = config.heads if "q_proj" in name else config.kv_heads
            pairs = tensor.view(heads, config.head_dim // 2, 2, -1)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def quantized(self, name: str) -> Quantized | None:
        return None

    def rope_factors(self) -> Tensor | None:
        if ROPE_FACTORS not in self._checkpoint.tensors:
            return None
        return self._dequantised(ROPE_FACTORS, torch.float32)

    def _dequantised(self, name: str, dtype: torch.dtype) -> Tensor:
        entry = self._checkpoint.tensors[name]
        assert isinstance(entry, GgufTensor)
        raw = _read(self._checkpoint.path, entry)
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
        self._progress.add(entry.nbytes)
        return out.view(entry.shape)


def _read(path: Path, entry: GgufTensor | SafeTensor) -> npt.NDArray[np.uint8]:
    """A tensor's bytes.

    Read, not mapped: what was mapped stays resident until its whole file is let go, and a network
    file system answers a page at a time.
    """
    raw = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset)
    if len(raw) != entry.nbytes:
        raise ModelError(
            "WeightsCorrupt", f"{path} became shorter while it was read. Fetch the file again."
        )
    return raw


def _pieces(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(_PIECE_BYTES // row_bytes, 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class SafetensorsWeights:
    """Tensors of safetensors shards."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self.dtype = dtype
        self._fp8 = frozenset(checkpoint.fp8_weights)
        self._progress = Progress("weights", checkpoint.weights_bytes)

    def load(self, name: str) -> Tensor:
        stored = self.quantized(name)
        return (self._read(name) if stored is None else stored.dequantized()).to(self.dtype)

    def quantized(self, name: str) -> Quantized | None:
        stored = self._checkpoint.stored
        if stored is None or name not in self._fp8:
            return None
        values, scales = self._read(name), self._read(stored.scales_of(name)).float()
        if stored.blocks:
            scales = scales.repeat_interleave(BLOCK, 0)[: len(values)]
        else:
            scales = scales.view(-1, 1).expand(len(values), 1)
        return Quantized(values, scales.contiguous(), bound=stored.bound)

    def _read(self, name: str) -> Tensor:
        entry = self._checkpoint.tensors[name]
        assert isinstance(entry, SafeTensor)
        raw = torch.from_numpy(_read(entry.path, entry))
        self._progress.add(entry.nbytes)
        return raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def rope_factors(self) -> Tensor | None:
        return None
