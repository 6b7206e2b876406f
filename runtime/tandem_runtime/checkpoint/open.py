"""A model on disk, seen through its headers alone: what it is, how big, and whether it is whole.

`open_checkpoint` reads no weights and loads no torch: the resolver and the serving pod both start
here, so they refuse the same things with the same sentences. Tensors go by their Hugging Face
names, whatever the file calls them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from tandem_runtime.checkpoint.config import MLP_NAMES, ROUTER, ModelConfig, expert_names
from tandem_runtime.checkpoint.config_gguf import config_from_gguf
from tandem_runtime.checkpoint.config_json import config_from_json
from tandem_runtime.checkpoint.digest import weights_digest
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from tandem_runtime.checkpoint.headers import version_of
from tandem_runtime.checkpoint.quantization import quantizable
from tandem_runtime.checkpoint.safetensors_header import (
    DTYPE_BYTES,
    SafeTensor,
    read_json,
    read_safetensors_headers,
)
from tandem_runtime.checkpoint.stored_fp8 import FP8_DTYPE, StoredFp8, is_unused, stored_fp8

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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": MLP_NAMES[0],
    "ffn_up": MLP_NAMES[1],
    "ffn_down": MLP_NAMES[2],
    "ffn_gate_inp": ROUTER,
}
_GGUF_EXPERTS: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
"""All experts of a layer, one after the other; in the order of `expert_names`."""
_GGUF_LAYER: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
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
    stored: StoredFp8 | None = None
    """How linears are stored in fp8, where they are."""

    @property
    def fp8_weights(self) -> list[str]:
        """The weights that are stored in fp8."""
        names = self.config.tensor_shapes() if self.stored else ()
        return [name for name in names if _dtype(self.tensors[name]) == FP8_DTYPE]

    def form(self, weights: str, exclude: Collection[str] = ()) -> str:
        """What linears become, as `quantization.misfit` names it, where `weights` is asked for, of
        all but `exclude` (`quantization.EXCLUDABLE`).

        Raises:
            ModelError: they are stored in another format, or others of them are.
        """
        if self.stored is None:
            return weights
        if exclude:
            raise ModelError(
                "BadConfig",
                f"{self.path} stores fp8 weights ({self.stored.method}) and what it left out of "
                "them: leave out quantization.exclude",
            )
        if weights not in ("none", "fp8"):
            raise ModelError(
                "BadConfig",
                f"{self.path} stores fp8 weights ({self.stored.method}), which {weights} would "
                "round again: use quantization.weights none or fp8",
            )
        return self.stored.form

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
        folder = self.path if self.path.is_dir() else self.path.parent
        config = repr(self.config).encode() + version_of(folder)
        config += repr(self.stored).encode() if self.stored else b""
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
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    config = config_from_gguf(header.metadata, shapes)
    tensors: dict[str, GgufTensor] = {}
    for tensor in header.tensors.values():
        tensors |= _under_hugging_face_names(tensor)
    return Checkpoint("gguf", config, tensors, path, header)


def _under_hugging_face_names(tensor: GgufTensor) -> dict[str, GgufTensor]:
    layer = _GGUF_LAYER.fullmatch(tensor.name)
    if layer is None:
        return {_GGUF_NAMES.get(tensor.name, tensor.name): tensor}
    prefix, kind, suffix = f"model.layers.{layer[1]}.", layer[2], layer[3]
    if kind in _GGUF_LAYER_NAMES:
        return {f"{prefix}{_GGUF_LAYER_NAMES[kind]}.{suffix}": tensor}
    if kind not in _GGUF_EXPERTS or len(tensor.shape) != 3 or not tensor.elements:
        return {tensor.name: tensor}
    projection, experts = _GGUF_EXPERTS.index(kind), tensor.shape[0]
    nbytes = tensor.nbytes // experts
    return {
        f"{prefix}{expert_names(index)[projection]}.{suffix}": replace(
            tensor, shape=tensor.shape[1:], offset=tensor.offset + index * nbytes, nbytes=nbytes
        )
        for index in range(experts)
    }


def _open_safetensors(path: Path) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    said = read_json(folder / "config.json")
    config, stored = config_from_json(said, eos_ids), stored_fp8(said)
    tensors = {
        name: tensor
        for name, tensor in read_safetensors_headers(path).items()
        if not (_WITHOUT_EFFECT.fullmatch(name) or (stored and is_unused(name)))
    }
    if config.tied_embeddings:
        tensors.pop("lm_head.weight", None)
    return Checkpoint("safetensors", config, tensors, path, None, stored)


def _file_of(tensor: GgufTensor | SafeTensor, path: Path) -> Path:
    return tensor.path if isinstance(tensor, SafeTensor) else path


def _dtype(tensor: GgufTensor | SafeTensor) -> str:
    return tensor.dtype if isinstance(tensor, SafeTensor) else ""


def _check_fp8(checkpoint: Checkpoint) -> set[str]:
    """The scales of fp8 weights, which are there and of the right shapes."""
    stored, scales = checkpoint.stored, set()
    for name in checkpoint.fp8_weights if stored else ():
        assert stored is not None
        found = checkpoint.tensors.get(stored.scales_of(name)) if quantizable(name) else None
        shape = checkpoint.config.tensor_shapes()[name]
        if found is None or found.shape not in stored.scale_shapes(shape):
            what = f"scales of shape {found.shape}" if found else f"no {stored.suffix} of its own"
            raise ModelError(
                "WeightsCorrupt",
                f"{checkpoint.path}: tensor {name} is {FP8_DTYPE} and has {what}, which "
                f"{stored.method} does not write for a linear layer of shape {shape}",
            )
        scales.add(found.name)
    return scales


def _check_tensors(checkpoint: Checkpoint) -> None:
    expected, path = checkpoint.config.tensor_shapes(), checkpoint.path
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise ModelError(
            "WeightsCorrupt",
            f"{path} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}. "
            "Fetch the whole checkpoint.",
        )
    scales, fp8 = _check_fp8(checkpoint), set(checkpoint.fp8_weights)
    for name, tensor in checkpoint.tensors.items():
        if name == ROPE_FACTORS or name in scales:
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
        if isinstance(tensor, SafeTensor) and tensor.dtype not in DTYPE_BYTES and name not in fp8:
            raise ModelError(
                "BadConfig",
                f"{path}: tensor {name} is {tensor.dtype}; weights of {', '.join(DTYPE_BYTES)} "
                "can be loaded",
            )
