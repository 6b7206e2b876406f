"""Quantised weights: what they stand for, their linear layers, and whole engines with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.checkpoint.quantization import loaded_bytes, quantized_names
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kernels.fp8_quantize import fp8_quantize_reference
from tandem_runtime.kernels.scaled_linear import scaled_linear_reference
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.linear import quantized_linear
from tandem_runtime.model.quantize import Quantized, quantize, stack
from tandem_runtime.model.sharding import check_fits, sizes_that_fit
from tandem_runtime.model.weights import open_weights
from tandem_runtime.protocol import Sampling
from torch.nn import functional

FORMATS = ("fp8", "int8", "int4")
STEPPED = FORMATS[1:]
"""Formats whose values are evenly apart."""
SHAPES = [(576, 960), (576, 3072), (1536, 576), (64, 112), (96, 16), (2048, 512)]
ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 128, 200]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", STEPPED)
def test_a_weight_is_at_most_half_a_step_off(form: str, dtype: torch.dtype) -> None:
    weight = randn(48, 96, dtype=dtype)
    weight[3] = 0.25
    weight[4] = 0.0
    packed = quantize(weight, form)
    off = (packed.dequantized().float() - weight.float()).view(*packed.scales.shape, -1).abs()
    # Beside the half step: the rounding of scale and zero, and of the result.
    steps = off / packed.scales.float()[..., None]
    rounding = torch.finfo(dtype).eps * 130
    assert float(steps[5:].max()) < 0.5 + rounding
    assert torch.equal(packed.dequantized()[3:5], weight[3:5])


def test_ends_of_a_row_are_kept_by_int8_and_of_a_group_by_int4() -> None:
    weight = torch.linspace(-2.0, 1.0, 64)[None].repeat(16, 1)
    assert quantize(weight, "int8").dequantized()[0, 0] == -2.0
    groups = quantize(weight, "int4").dequantized().view(16, 2, 32)
    torch.testing.assert_close(groups[:, :, (0, 31)], weight.view(16, 2, 32)[:, :, (0, 31)])


@pytest.mark.parametrize("form", FORMATS)
def test_pieces_are_the_whole(form: str) -> None:
    weight = randn(64, 96)
    parts = stack([quantize(piece, form) for piece in weight.split(16)])
    for part, whole in zip(parts, quantize(weight, form), strict=True):
        assert part is whole or torch.equal(part, whole)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_does_not_depend_on_how_many_there_are(inputs: int, outputs: int, form: str) -> None:
    torch.set_num_threads(1)
    linear = quantized_linear(
        quantize(randn(outputs, inputs), form), randn(outputs), torch.bfloat16
    )
    x = randn(256, inputs)
    whole = linear(x)
    for rows in ROWS:
        for start in range(0, len(x) - rows + 1, rows):
            part = slice(start, start + rows)
            assert torch.equal(linear(x[part]), whole[part]), f"{rows} rows from {start}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_the_weights_stood_for(
    form: str, dtype: torch.dtype, has_bias: bool
) -> None:
    packed, x = quantize(randn(48, 64, dtype=dtype), form), randn(5, 64, dtype=dtype)
    bias = randn(48, dtype=dtype) if has_bias else None
    y = quantized_linear(packed, bias, dtype)(x)
    if form == "fp8":
        x = Quantized(*fp8_quantize_reference(x)).dequantized()
    exact = functional.linear(x.double(), exactly(packed))
    exact += 0.0 if bias is None else bias.double()
    assert y.dtype == dtype
    # The weights are rounded on the way, and a bias comes after the sum was.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=8 * tolerance)


def exactly(packed: Quantized) -> torch.Tensor:
    zeros = None if packed.zeros is None else packed.zeros.double()
    return Quantized(packed.values, packed.scales.double(), zeros).dequantized()


def tokens(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    for index, ids in enumerate(prompts):
        assert engine.add(Request(str(index), ids, sampling)) is None
    out: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for stream in engine.step().streams:
            if stream.token is not None:
                out[int(stream.request_id)].append(stream.token.token_id)
    return out


@pytest.mark.parametrize(
    ("weights", "kv_cache"),
    [*((form, "auto") for form in FORMATS), ("none", "fp8"), ("fp8", "fp8")],
)
def test_a_stream_is_the_same_in_any_company(
    weights: str, kv_cache: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    uri = f"file://{tiny_checkpoint()}"
    config = EngineConfig(uri, weights=weights, kv_cache=kv_cache, kv_cache_bytes=1 << 23)
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 101, (n,), generator=random).tolist() for n in (5, 150, 33, 80)]
    together = tokens(build_engine(config), prompts)
    alone = [tokens(build_engine(config), [prompt])[0] for prompt in prompts]
    assert together == alone


def test_fp8_groups_are_the_formula() -> None:
    weight, x = randn(48, 256), randn(5, 256)
    packed = Quantized(*fp8_quantize_reference(weight, groups=2), bound=2.0)
    y = quantized_linear(packed, None, torch.bfloat16)(x)
    q, t = fp8_quantize_reference(x, groups=2, bound=2.0)
    expected = scaled_linear_reference(q, packed.values, packed.scales, None, t, torch.bfloat16)
    assert float(t.max()) == pytest.approx(2 / 448)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("weights", FORMATS)
def test_excluded_linears_stay_as_they_are(
    weights: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(num_hidden_layers=4))
    config, x = checkpoint.config, randn(3, checkpoint.config.hidden)

    def outputs(quantization: str, *exclude: str) -> list[torch.Tensor]:
        """Of each layer's attention projections."""
        opened, cpu = open_weights(checkpoint, torch.bfloat16), torch.device("cpu")
        form = {"quantization": quantization, "exclude": exclude}
        return [layer.qkv(x).clone() for layer in Decoder(config, opened, 64, cpu, **form)._layers]

    whole, quantized = outputs("none"), outputs(weights)
    assert not torch.equal(whole[1], quantized[1])
    for exclude, kept in (
        (("first-layer", "last-layer"), {0, 3}),
        (("first-layer",), {0}),
        (("attention",), {0, 1, 2, 3}),
    ):
        for index, output in enumerate(outputs(weights, *exclude)):
            assert torch.equal(output, (whole if index in kept else quantized)[index]), exclude
        names = quantized_names(config, exclude)
        assert len(names) == (12 if exclude == ("attention",) else 7 * (4 - len(kept)))
        assert loaded_bytes(config, weights, 2, names) > loaded_bytes(config, weights, 2)


def test_what_the_kv_was_computed_with_is_in_the_layout_hash(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    uri = f"file://{tiny_checkpoint()}"
    setups = [{"weights": form} for form in ("none", *FORMATS)]
    setups += [{"weights": "fp8", "weights_exclude": ("attention",)}]
    setups += [{"kv_cache": "fp8"}, {"kv_cache": "fp8", "dtype": "float32"}]
    engines = [build_engine(EngineConfig(uri, kv_cache_bytes=1 << 22, **s)) for s in setups]
    assert len({engine.layout_hash for engine in engines}) == len(setups)
    assert [engine.layout.token_bytes for engine in engines[-3:]] == [1024, 512, 512]


def test_what_cannot_be_quantised_is_refused_with_what_works(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    odd = open_checkpoint(tiny_checkpoint(hidden_size=72, num_attention_heads=2)).config
    sentence = r"q_proj.weight has shape \(128, 72\); int8 .* multiples of 16: use weights none"
    with pytest.raises(ModelError, match=sentence):
        check_fits(odd, 1, "int8")
    config = open_checkpoint(tiny_checkpoint(intermediate_size=96, num_attention_heads=6)).config
    assert sizes_that_fit(config) == [1, 2, 6]
    assert sizes_that_fit(config, "int8") == [1, 2, 6]
    assert sizes_that_fit(config, "int4") == [1]
    with pytest.raises(ModelError, match=r"2 ranks .*, with int4 weights; this model works with 1"):
        check_fits(config, 2, "int4")
    experts = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
    mixtral = open_checkpoint(tiny_checkpoint(**experts)).config
    with pytest.raises(ModelError, match=r"experts .* cannot be quantised yet: use weights none"):
        check_fits(mixtral, 1, "fp8")
    with pytest.raises(ValueError, match="kv_cache 'int8' is none of auto, fp8"):
        EngineConfig("file:///m", kv_cache="int8")
    with pytest.raises(ValueError, match="weights_exclude is given, but weights are not quantised"):
        EngineConfig("file:///m", weights_exclude=("attention",))
    with pytest.raises(ValueError, match="weights_exclude 'mlp' is none of attention, first-layer"):
        EngineConfig("file:///m", weights="fp8", weights_exclude=("mlp",))
    with pytest.raises(ValueError, match="weights 'int5' is none of none, fp8, int8, int4"):
        EngineConfig("file:///m", weights="int5")
