"""The arithmetic of tensor parallelism: which rank holds which part of what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.model.parallel import ShardedWeights
from tandem_runtime.model.sharding import Sharding, sizes_that_fit
from torch import Tensor

SMALL = ModelConfig(
    architecture="LlamaForCausalLM",
    layers=1,
    hidden=8,
    intermediate=24,
    heads=12,
    kv_heads=2,
    head_dim=2,
    vocab_size=29,
    context_tokens=64,
    rms_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_embeddings=False,
    eos_token_ids=(),
)


class Numbered:
    """Weights whose every element is another number; `Weights`."""

    dtype = torch.int64

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = config.tensor_shapes()

    def load(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)

    def quantized(self, name: str) -> None:
        return None

    def rope_factors(self) -> Tensor | None:
        return None


@pytest.mark.parametrize("size", [1, 2, 4, 6, 12])
def test_the_parts_of_all_ranks_are_the_whole(size: int) -> None:
    """Put together along the axis that was cut, copies of kv heads counted once."""
    sharding, whole = Sharding(SMALL, size), Numbered(SMALL)
    parts = [ShardedWeights(whole, sharding, rank) for rank in range(size)]
    for name, shape in SMALL.tensor_shapes().items():
        held = [part.load(name) for part in parts]
        assert [tuple(part.shape) for part in held] == [
            sharding.local.tensor_shapes()[name]
        ] * size, name
        cut = sharding.cut(name, 0)
        if cut is None:
            assert all(torch.equal(part, whole.load(name)) for part in held), name
            continue
        if ".k_proj." in name or ".v_proj." in name:
            held = [held[rank] for rank in sharding.kv_owners()]
        joined = torch.cat(held, cut.axis)
        length = shape[cut.axis]
        assert torch.equal(joined.narrow(cut.axis, 0, length), whole.load(name)), name
        rest = joined.narrow(cut.axis, length, joined.shape[cut.axis] - length)
        assert not rest.any(), f"{name}: padding is not zero"


@pytest.mark.parametrize("size", [1, 2, 4, 6, 12])
def test_a_rank_holds_the_kv_heads_that_its_heads_attend_to(size: int) -> None:
    sharding = Sharding(SMALL, size)
    group = SMALL.heads // SMALL.kv_heads
    for rank in range(size):
        heads = range(rank * sharding.local.heads, (rank + 1) * sharding.local.heads)
        assert sorted({head // group for head in heads}) == list(sharding.kv_heads_of(rank))
    owned = [head for rank in sharding.kv_owners() for head in sharding.kv_heads_of(rank)]
    assert owned == list(range(SMALL.kv_heads))


dimensions = st.sampled_from([1, 2, 3, 4, 6, 8, 9, 12, 16])


@given(kv_heads=dimensions, group=dimensions, width=dimensions, size=st.integers(1, 64))
def test_a_size_is_refused_with_those_that_fit(
    kv_heads: int, group: int, width: int, size: int
) -> None:
    config = replace(SMALL, heads=kv_heads * group, kv_heads=kv_heads, intermediate=width * 12)
    sizes = sizes_that_fit(config)
    assert sizes[0] == 1
    if size in sizes:
        local = Sharding(config, size).local
        assert local.heads * size == config.heads
        assert local.intermediate * size == config.intermediate
        return
    with pytest.raises(ModelError, match=f"works with {', '.join(map(str, sizes))}$"):
        Sharding(config, size)


def test_a_bias_of_a_sum_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    shapes = ModelConfig.tensor_shapes
    monkeypatch.setattr(
        ModelConfig, "tensor_shapes", lambda config: shapes(config) | {name: (config.hidden,)}
    )
    whole = Numbered(SMALL)
    first, second = (ShardedWeights(whole, Sharding(SMALL, 2), rank) for rank in (0, 1))
    assert torch.equal(first.load(name), whole.load(name))
    assert not second.load(name).any()
