"""A model on disk, seen through its headers alone: what it is, how big, and whether it is whole.

`open_checkpoint` reads no weights and loads no torch: the resolver and the serving pod both start
here, so they refuse the same things with the same sentences. Tensors go by their Hugging Face
names, whatever the file calls them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from tandem_runtime.checkpoint.config import ModelConfig, config_from_gguf, config_from_json
from tandem_runtime.checkpoint.digest import weights_digest
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from tandem_runtime.checkpoint.safetensors_header import (
    DTYPE_BYTES,
    SafeTensor,
    read_json,
    read_safetensors_headers,
)

ROPE_FACTORS: Final = "rope_factors"
"""[head_dim / 2] float32: divisors of the rope frequencies, which some GGUF files carry."""

_GGUF_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": ROPE_FACTORS,
}
_GGUF_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_LAYER: Final = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_WITHOUT_EFFECT: Final = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and its tensors' places; every tensor it needs is there and whole."""

    format: Literal["gguf", "safetensors"]
    config: ModelConfig
    tensors: Mapping[str, GgufTensor | SafeTensor]
    """By Hugging Face name, and `ROPE_FACTORS`."""
    path: Path
    gguf: GgufHeader | None
    """The header with the tokenizer's metadata, for a GGUF file."""

    @property
    def parameters(self) -> int:
        """Weights of the model; a tied embedding counts once."""
        return sum(self.tensors[name].elements for name in self.config.tensor_shapes())

    @property
    def weights_bytes(self) -> int:
        """Bytes of those weights as they are stored."""
        return sum(self.tensors[name].nbytes for name in self.config.tensor_shapes())

    def digest(self) -> str:
        """32 hex digits that name these weights and this configuration (digest.py)."""
        places: dict[Path, list[tuple[int, int]]] = defaultdict(list)
        for tensor in self.tensors.values():
            places[_file_of(tensor, self.path)].append((tensor.offset, tensor.nbytes))
        config = repr(self.config).encode()
        return weights_digest(config, [(path, sorted(places[path])) for path in sorted(places)])


def open_checkpoint(path: Path) -> Checkpoint:
    """The model at `path`: a .gguf file, a .safetensors file, or a folder of shards.

    Raises:
        ModelError: it cannot be served, and why.
    """
    if path.is_file() and path.suffix == ".gguf":
        checkpoint = _open_gguf(path)
    elif path.is_dir() or path.suffix == ".safetensors":
        checkpoint = _open_safetensors(path)
    else:
        raise ModelError(
            "UnsupportedSource",
            f"{path} is no model: name a .gguf file, a .safetensors file or a folder of them",
        )
    _check_tensors(checkpoint)
    return checkpoint


def _open_gguf(path: Path) -> Checkpoint:
    header = read_gguf_header(path)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError("WeightsCorrupt", f"{path} has no tensor token_embd.weight")
    config = config_from_gguf(
        header.metadata,
        vocab_size=embedding.shape[0],
        tied_embeddings="output.weight" not in header.tensors,
    )
    tensors = {_hugging_face_name(name): tensor for name, tensor in header.tensors.items()}
    return Checkpoint("gguf", config, tensors, path, header)


def _hugging_face_name(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    layer = _GGUF_LAYER.fullmatch(name)
    if layer is None or layer[2] not in _GGUF_LAYER_NAMES:
        return name
    return f"model.layers.{layer[1]}.{_GGUF_LAYER_NAMES[layer[2]]}.weight"


def _open_safetensors(path: Path) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    config = config_from_json(read_json(folder / "config.json"), eos_ids)
    tensors = {
        name: tensor
        for name, tensor in read_safetensors_headers(path).items()
        if not _WITHOUT_EFFECT.fullmatch(name)
    }
    if config.tied_embeddings:
        tensors.pop("lm_head.weight", None)
    return Checkpoint("safetensors", config, tensors, path, None)


def _file_of(tensor: GgufTensor | SafeTensor, path: Path) -> Path:
    return tensor.path if isinstance(tensor, SafeTensor) else path


def _check_tensors(checkpoint: Checkpoint) -> None:
    expected, path = checkpoint.config.tensor_shapes(), checkpoint.path
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise ModelError(
            "WeightsCorrupt",
            f"{path} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}. "
            "Fetch the whole checkpoint.",
        )
    for name, tensor in checkpoint.tensors.items():
        if name == ROPE_FACTORS:
            continue
        if name not in expected:
            raise ModelError(
                "BadConfig",
                f"{path} has the tensor {name}, which {checkpoint.config.architecture} as Tandem "
                "computes it has no use for",
            )
        if tensor.shape != expected[name]:
            raise ModelError(
                "WeightsCorrupt",
                f"{path}: tensor {name} has shape {tensor.shape}, the configuration asks for "
                f"{expected[name]}",
            )
        if isinstance(tensor, SafeTensor) and tensor.dtype not in DTYPE_BYTES:
            raise ModelError(
                "BadConfig",
                f"{path}: tensor {name} is {tensor.dtype}; weights of {', '.join(DTYPE_BYTES)} "
                "can be loaded",
            )
