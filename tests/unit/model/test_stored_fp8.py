"""Checkpoints that store fp8: each format as it is written, cut for ranks, and refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.kernels.fp8_quantize import FP8, fp8_quantize_reference
from tandem_runtime.model.parallel import ShardedWeights
from tandem_runtime.model.sharding import Sharding, check_fits, sizes_that_fit
from tandem_runtime.model.weights import open_weights
from tandem_runtime.protocol import Sampling
from tandem_runtime.resolve.report import resolve

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
FP8_KIND = {"type": "float", "num_bits": 8}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    inputs = FP8_KIND | {"strategy": "tensor" if strategy == "tensor" else "token"}
    group = {"weights": FP8_KIND | {"strategy": strategy} | more, "input_activations": inputs}
    said = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
    }
    return said | {"config_groups": {"group_0": group | {"targets": ["Linear"]}}}


FORMATS: dict[str, dict[str, Any]] = {
    "channel": compressed("channel"),
    "tensor": compressed("tensor"),
    "block": compressed("block", block_structure=[128, 128]),
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "fp8": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"},
}
Make = Callable[[str], Path]


@pytest.fixture
def make(tiny_checkpoint: Callable[..., Path]) -> Make:
    """`make(format)`: a checkpoint in bfloat16 whose linears are stored so."""

    def write(form: str) -> Path:
        folder = tiny_checkpoint(dtype=torch.bfloat16, **SHAPE)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": FORMATS[form]})
        )
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            # Meta's checkpoints leave attention as it is.
            if form == "fbgemm" and "self_attn" in name:
                continue
            tensors |= stored(name, tensors[name].float(), form)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


def stored(name: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    prefix = name.removesuffix("weight")
    if form in ("channel", "fbgemm"):
        values, scale = fp8_quantize_reference(weight)
        return {name: values, f"{prefix}weight_scale": scale}
    if form in ("tensor", "fp8"):
        scale = (weight.abs().max() / 448).reshape(1 if form == "tensor" else ())
        tensors = {name: (weight / scale).to(FP8), f"{prefix}weight_scale": scale}
        return tensors | {f"{prefix}input_scale": torch.ones(())}
    rows, columns = (-(-n // 128) for n in weight.shape)
    scale = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=FP8)
    for r in range(rows):
        for c in range(columns):
            at = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
            scale[r, c] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scale[r, c]).to(FP8)
    suffix = "weight_scale" if form == "block" else "weight_scale_inv"
    return {name: values, f"{prefix}{suffix}": scale}


def tokens(engine: Engine) -> list[int]:
    ask = Request(
        "s", list(range(3, 60)), Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)
    )
    assert engine.add(ask) is None
    out = []
    while engine.has_work:
        out += [s.token.token_id for s in engine.step().streams if s.token is not None]
    return out


@pytest.mark.parametrize("form", FORMATS)
def test_values_and_scales_are_the_stored_ones(
    form: str, make: Make, tiny_checkpoint: Callable[..., Path]
) -> None:
    weights = open_weights(open_checkpoint(make(form)), torch.bfloat16)
    plain = load_file(tiny_checkpoint(dtype=torch.bfloat16, **SHAPE) / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    packed = weights.quantized(name)
    assert packed is not None
    assert packed.bound == FORMATS[form].get("activation_scale_ub", float("inf"))
    assert packed.scales.shape == (256, 12 if "block" in form else 1)
    off = (packed.dequantized() - plain[name].float()).abs()
    largest = packed.scales.repeat_interleave(1536 // packed.scales.shape[1], 1) * 448
    assert bool((off <= plain[name].abs() / 15 + largest * 2**-17).all())
    torch.testing.assert_close(weights.load(name), packed.dequantized().bfloat16())
    attention = weights.quantized("model.layers.0.self_attn.q_proj.weight")
    assert (attention is None) == (form == "fbgemm")
    assert weights.quantized("lm_head.weight") is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_rank_s_share_is_cut_from_what_is_stored(form: str, make: Make) -> None:
    checkpoint = open_checkpoint(make(form))
    whole = open_weights(checkpoint, torch.float32)
    sharding = Sharding(checkpoint.config, 2)
    for rank in range(2):
        share = ShardedWeights(whole, sharding, rank)
        for name in ("mlp.down_proj", "mlp.up_proj"):
            packed = share.quantized(f"model.layers.0.{name}.weight")
            assert packed is not None
            expected = share.load(f"model.layers.0.{name}.weight")
            assert torch.equal(packed.dequantized(), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_engines_serve_them(form: str, make: Make, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = make(form)
    engine = build_engine(EngineConfig(f"file://{folder}", kv_cache_bytes=1 << 22))
    found = tokens(engine)
    assert len(found) == 16
    if form == "channel":
        plain = f"file://{tiny_checkpoint(dtype=torch.bfloat16, **SHAPE)}"
        at_load = EngineConfig(plain, weights="fp8", kv_cache_bytes=1 << 22)
        assert found == tokens(build_engine(at_load))


def test_the_resolver_counts_what_is_stored(make: Make) -> None:
    for form, groups in (("channel", 1), ("fp8 blocks", 2)):
        report = resolve(f"file://{make(form)}", "bfloat16", None)
        plain = 2 * (2 * 101 * 256 + 5 * 256)
        linears = sum(
            2 * rows * (columns + 4 * (columns // 128 if groups > 1 else 1))
            for rows, columns in ((512, 256), (256, 256), (3072, 256), (256, 1536))
        )
        assert report["loadedBytes"] == plain + linears
    # A fourth of the attention's output projection has 64 columns, half a block.
    assert report["tensorParallelSizes"] == [1, 2]


def test_blocks_are_not_cut(make: Make) -> None:
    checkpoint = open_checkpoint(make("block"))
    assert checkpoint.form("none") == checkpoint.form("fp8") == "fp8 in blocks"
    assert sizes_that_fit(checkpoint.config, "fp8") == [1, 2, 4]
    with pytest.raises(ModelError, match="8 ranks cannot share"):
        check_fits(checkpoint.config, 8, "fp8 in blocks")
    with pytest.raises(ModelError, match=r"use quantization\.weights none or fp8"):
        checkpoint.form("int4")
    with pytest.raises(ModelError, match=r"leave out quantization\.exclude"):
        checkpoint.form("fp8", ("attention",))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            {"quant_method": "awq"},
            "by awq cannot be loaded; these can: compressed-tensors",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        (compressed("group"), "compressed-tensors by group"),
        (compressed("channel", type="int"), "weights int8 and activations float8"),
        (compressed("tensor") | {"kv_cache_scheme": {"num_bits": 8}}, "with kv_cache_scheme"),
        ({"quant_method": "compressed-tensors"}, "with no config_groups"),
        ("mine", "'mine'"),
    ],
)
def test_other_formats_are_refused_by_name(
    said: Any, sentence: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        open_checkpoint(tiny_checkpoint(quantization_config=said))
    assert caught.value.message.endswith("bfloat16 weights and set quantization.weights")


def test_a_weight_without_its_scales_is_refused(make: Make) -> None:
    folder = make("channel")
    tensors = load_file(folder / "model.safetensors")
    scale = tensors.pop("model.layers.0.mlp.up_proj.weight_scale")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.weight is F8_E4M3 and has no weight_scale"):
        open_checkpoint(folder)
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = scale[:7]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has scales of shape \(7, 1\), which compressed-tensors"):
        open_checkpoint(folder)
