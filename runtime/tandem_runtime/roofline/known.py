"""Published shapes of models, so that planning one needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.model import ModelShape, model_from_json, read_model

_LLAMA_31: Final = {
    "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
}  # fmt: skip
KNOWN: Final[dict[str, dict[str, Any]]] = {
    "llama-3.1-8b": _LLAMA_31
    | {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": _LLAMA_31
    | {
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64,
    },
    "llama-3.1-405b": _LLAMA_31
    | {
        "num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248,
        "num_attention_heads": 128,
    },
}  # fmt: skip


def find_model(name: str) -> ModelShape:
    """A known model by name, or one by the path of its config.json. Raises RooflineError."""
    values = KNOWN.get(name.lower())
    if values is not None:
        return model_from_json(values, name.lower())
    if not Path(name).exists():
        raise RooflineError(
            f"there is no file {name}, and no model of that name is known: give the path of a "
            f"config.json or one of {', '.join(KNOWN)}"
        )
    return read_model(Path(name))
