"""Llama-3.1-405B without its weights: shapes, shares of 8 ranks, memory, against published numbers.

The model that is built is the one that serves, on the meta device, which has shapes and no memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.checkpoint.config_json import config_from_json
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.quantization import loaded_bytes
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.parallel import Ranks
from tandem_runtime.model.sharding import Sharding, sizes_that_fit
from torch import Tensor

RANKS = 8
PARAMETERS = 405_853_388_800
"""405.85 billion (arXiv:2407.21783 and the model card say 405B)."""
BF16_BYTES = 811_706_777_600
"""812 GB."""
KV_TOKEN_BYTES = 516_096
H100_BYTES = 80 * 10**9


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    text = (Path(__file__).parent / "llama-3.1-405b.json").read_text()
    return config_from_json(json.loads(text), ())


class Shapes:
    """Weights of the right shapes and no content; every tensor is asked for once. `Weights`."""

    dtype = torch.bfloat16

    def __init__(self, config: ModelConfig) -> None:
        self.left = config.tensor_shapes()

    def load(self, name: str) -> Tensor:
        return torch.empty(self.left.pop(name), dtype=torch.bfloat16, device="meta")

    def quantized(self, name: str) -> None:
        return None

    def rope_factors(self) -> Tensor | None:
        return None


def tensors(part: Any) -> Iterator[Tensor]:
    """Every tensor that a model's part refers to, however deep."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from tensors(item)
    elif type(part).__module__.startswith("tandem_runtime.model"):
        for value in vars(part).values():
            yield from tensors(value)


def weights_of(model: Decoder) -> list[Tensor]:
    """Without the rope tables, which are float32."""
    return [t for t in tensors(model) if t.dtype != torch.float32]


def build(config: ModelConfig, ranks: Ranks) -> Decoder:
    shapes = Shapes(config)
    model = Decoder(config, shapes, 256, torch.device("meta"), ranks=ranks)
    assert not shapes.left, f"tensors that nobody loads: {list(shapes.left)[:3]}"
    return model


def test_the_whole_model(config: ModelConfig) -> None:
    assert sum(math.prod(shape) for shape in config.tensor_shapes().values()) == PARAMETERS
    held = weights_of(build(config, Ranks()))
    assert sum(t.numel() for t in held) == PARAMETERS
    assert sum(t.nbytes for t in held) == BF16_BYTES
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, "bfloat16")
    assert layout.token_bytes == KV_TOKEN_BYTES
    # A stream of the whole context: 67.6 GB.
    assert layout.token_bytes * config.context_tokens == 67_645_734_912


def test_every_tensor_of_a_rank_of_eight(config: ModelConfig) -> None:
    local = Sharding(config, RANKS).local.tensor_shapes()
    prefix = "model.layers.125."
    assert {name: local[name] for name in local if name.startswith(prefix)} == {
        f"{prefix}input_layernorm.weight": (16384,),
        f"{prefix}self_attn.q_proj.weight": (2048, 16384),
        f"{prefix}self_attn.k_proj.weight": (128, 16384),
        f"{prefix}self_attn.v_proj.weight": (128, 16384),
        f"{prefix}self_attn.o_proj.weight": (16384, 2048),
        f"{prefix}post_attention_layernorm.weight": (16384,),
        f"{prefix}mlp.gate_proj.weight": (6656, 16384),
        f"{prefix}mlp.up_proj.weight": (6656, 16384),
        f"{prefix}mlp.down_proj.weight": (16384, 6656),
    }
    ends = {name: shape for name, shape in local.items() if "layers" not in name}
    assert ends == {
        "model.embed_tokens.weight": (16032, 16384),
        "lm_head.weight": (16032, 16384),
        "model.norm.weight": (16384,),
    }
    assert sizes_that_fit(config) == [1, 2, 4, 8, 16, 32, 64]


def test_the_memory_of_eight_ranks(config: ModelConfig) -> None:
    """bf16 does not fit eight GPUs of 80 GB; fp8 layers do, with room for 300,000 tokens of KV."""
    norms = (2 * config.layers + 1) * config.hidden
    for rank in range(RANKS):
        held = weights_of(build(config, Ranks(RANKS, rank)))
        cut = (PARAMETERS - norms) // RANKS
        assert sum(t.numel() for t in held) == cut + norms
        assert sum(t.nbytes for t in held) == 101_470_601_216 > H100_BYTES
    fp8 = loaded_bytes(Sharding(config, RANKS).local, "fp8", item_bytes=2)
    assert fp8 == 51_289_167_872
    kv = H100_BYTES * 9 // 10 - fp8
    assert kv // (KV_TOKEN_BYTES // RANKS) > 300_000


@pytest.mark.parametrize("size", [3, 5, 128])
def test_numbers_of_ranks_that_do_not_share_it(config: ModelConfig, size: int) -> None:
    with pytest.raises(ModelError, match=r"works with 1, 2, 4, 8, 16, 32, 64$"):
        Sharding(config, size)
