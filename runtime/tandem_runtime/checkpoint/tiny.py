"""Generated checkpoints: random weights of any shape, and a whole tiny model that serves.

`python -m tandem_runtime.checkpoint.tiny FOLDER` writes the tiny one: a Llama of two layers with
a token for each byte, whose answers are random letters that do not end by themselves. It is the
model of paced pods (engine/pace.py) and of whoever needs a pod that is ready in a second.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from tandem_runtime.checkpoint.byte_tokens import byte_tokenizer
from tandem_runtime.checkpoint.config_json import config_from_json

EOS: Final = "<eos>"
CONTEXT_TOKENS: Final = 131_072
_LETTERS: Final = string.ascii_lowercase + "Ġ"
"""Tokens of answers; the last one is a space, as byte-level vocabularies spell it."""
_LOUDNESS: Final = 4.0
"""Of letters' logits, so that other tokens, whose logits are 0, are hardly ever sampled."""
TEMPLATE: Final = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SHAPE: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """float32 weights for every tensor of a config.json, by name.

    Wide enough that attention is peaked and every token depends on the whole context.

    Raises:
        ModelError: no such model is served.
    """
    random = torch.Generator().manual_seed(seed)
    shapes = config_from_json(config, ()).tensor_shapes()
    tensors = {
        name: torch.randn(shape, generator=random) * 2.0 / shape[1] ** 0.5
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    for name, shape in shapes.items():
        if len(shape) == 1:
            noise = torch.randn(shape, generator=random)
            tensors[name] = noise if name.endswith("bias") else 1.0 + 0.2 * noise
    return tensors


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """config.json and model.safetensors, in a folder that exists."""
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # pods of another user read it too


def write_tiny(folder: Path, seed: int = 0) -> None:
    """The tiny model, with its tokenizer and chat template; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([EOS])
    size, eos = tokenizer.get_vocab_size(), tokenizer.token_to_id(EOS)
    config = SHAPE | {"vocab_size": size, "eos_token_id": eos}
    tensors = random_weights(config, seed)
    letters = [tokenizer.token_to_id(letter) for letter in _LETTERS]
    head = torch.zeros_like(tensors["lm_head.weight"])
    head[letters] = tensors["lm_head.weight"][letters] * _LOUDNESS
    write_checkpoint(folder, config, tensors | {"lm_head.weight": head}, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": EOS, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    """See the module."""
    cli = argparse.ArgumentParser(
        prog="python -m tandem_runtime.checkpoint.tiny",
        description="Write a tiny generated model, ready to be served as file://FOLDER.",
    )
    cli.add_argument("folder", type=Path, help="is made; files in it are replaced")
    cli.add_argument("--seed", type=int, default=0, help="another one is another model")
    options = cli.parse_args()
    write_tiny(options.folder, options.seed)
    print(f"file://{options.folder.resolve()}")


if __name__ == "__main__":
    main()
