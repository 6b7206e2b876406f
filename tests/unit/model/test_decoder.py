"""Logits against transformers on generated checkpoints, at every position."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tandem_runtime import kernels
from tandem_runtime.checkpoint.errors import ModelError
from tandem_runtime.checkpoint.open import open_checkpoint
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.weights import open_weights
from tandem_runtime.protocol import Sampling

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}
WINDOW = {"sliding_window": 300, "max_position_embeddings": 512}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 160,
}
MODELS = [
    pytest.param({}, id="llama, groups of 3"),
    pytest.param({"num_key_value_heads": 6}, id="llama, ungrouped"),
    pytest.param(
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 20}, id="llama, group of 8"
    ),
    pytest.param({"tie_word_embeddings": True, "head_dim": 16}, id="llama, tied"),
    pytest.param({"rope_scaling": LLAMA3, "rope_theta": 500000.0}, id="llama 3.1"),
    pytest.param({"attention_bias": True, "mlp_bias": True}, id="llama, biases"),
    pytest.param(MISTRAL | {"sliding_window": None}, id="mistral"),
    pytest.param(MISTRAL | WINDOW, id="mistral, within its window"),
    pytest.param(QWEN2 | {"head_dim": 16, "rms_norm_eps": 1e-6}, id="qwen2"),
    pytest.param(QWEN2 | WINDOW | {"tie_word_embeddings": True}, id="qwen2, tied, unused window"),
    pytest.param(
        QWEN2 | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
        id="qwen2, within its window",
    ),
    pytest.param(QWEN3, id="qwen3"),
    pytest.param(QWEN3 | {"attention_bias": True, "tie_word_embeddings": True}, id="qwen3, biases"),
    pytest.param(MIXTRAL, id="mixtral"),
    pytest.param(MIXTRAL | {"num_experts_per_tok": 1}, id="mixtral, one expert"),
]
TOKENS = 300
CPU = torch.device("cpu")


def our_logits(path: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    with torch.inference_mode():
        model = Decoder(config, open_weights(checkpoint, dtype), config.context_tokens, CPU)
        blocks = -(-len(ids) // 16)
        shape = (config.layers, 2, blocks + 1, config.kv_heads, 16, config.head_dim)
        positions = torch.arange(len(ids))
        step = Step([len(ids)], [len(ids)], [list(range(1, blocks + 1))], 16)
        work = kernels.plan_attention(
            step, heads=config.heads, kv_heads=config.kv_heads, device=CPU, dtype=dtype
        )
        cache = torch.zeros(shape, dtype=dtype)
        return model.forward(torch.tensor(ids), positions, positions + 16, cache, work, positions)


def their_logits(folder: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.float()


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("changes", MODELS)
def test_logits_equal_transformers_at_every_position(
    tiny_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    ids = torch.randint(0, 101, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    folder = tiny_checkpoint(**changes)
    ours, theirs = our_logits(folder, ids), their_logits(folder, ids)
    assert worst(ours, theirs) < 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("changes", MODELS)
def test_greedy_tokens_equal_transformers(
    tiny_checkpoint: Callable[..., Path], changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(**changes)
    prompts = [[5, 17, 80, 33], list(range(3, 40)), [99]]
    engine = build_engine(
        EngineConfig(model_uri=folder.as_uri(), dtype="float32", kv_cache_bytes=1 << 23)
    )
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, sampling))
    ours: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while engine.has_work:
        for stream in engine.step().streams:
            ours[stream.request_id] += [stream.token.token_id] if stream.token else []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert ours[str(index)] == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", [QWEN2, QWEN3, MIXTRAL], ids=["qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_is_the_same_bit_for_bit_in_any_company(
    tiny_checkpoint: Callable[..., Path], changes: dict[str, Any], dtype: str
) -> None:
    random = torch.Generator().manual_seed(7)
    lengths = (1, 5, 40, 17, 90)
    prompts = [torch.randint(0, 101, (n,), generator=random).tolist() for n in lengths]
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)

    def generate(engine: Engine, together: list[list[int]]) -> list[list[SampledToken]]:
        for index, prompt in enumerate(together):
            engine.add(Request(str(index), prompt, sampling))
        tokens: list[list[SampledToken]] = [[] for _ in together]
        while engine.has_work:
            for stream in engine.step().streams:
                tokens[int(stream.request_id)] += [stream.token] if stream.token else []
        return tokens

    engine = build_engine(
        EngineConfig(
            model_uri=tiny_checkpoint(**changes).as_uri(),
            dtype=dtype,
            kv_cache_bytes=1 << 23,
            max_batch_tokens=64,
            prefix_caching=False,
        )
    )
    assert generate(engine, prompts) == [generate(engine, [prompt])[0] for prompt in prompts]


def test_a_window_bounds_the_context(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(**MISTRAL, **WINDOW)
    config = open_checkpoint(folder).config
    assert config.limit_context(None) == 300
    with pytest.raises(ModelError, match="maxContextTokens is 301, but the model was made for 300"):
        config.limit_context(301)
    # And rightly so: beyond, transformers computes something else.
    ids = torch.randint(0, 101, (302,), generator=torch.Generator().manual_seed(1)).tolist()
    path = tiny_checkpoint(**MISTRAL, sliding_window=None)
    assert worst(our_logits(path, ids)[:300], their_logits(folder, ids)[:300]) < 1e-4
    assert worst(our_logits(path, ids)[300:], their_logits(folder, ids)[300:]) > 1e-3


def test_rope_factors_of_a_gguf_do_what_llama3_scaling_does(
    tiny_checkpoint: Callable[..., Path], to_gguf: Callable[..., Path]
) -> None:
    ids = list(range(100)) * 3
    folder = tiny_checkpoint(rope_scaling=LLAMA3, rope_theta=500000.0)
    config = json.loads((folder / "config.json").read_text())
    # llama.cpp's converter stores the scaling as divisors of the frequencies.
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    from tandem_runtime.checkpoint.config import Llama3Rope
    from tandem_runtime.model.rope import _stretch

    factors = frequencies / _stretch(frequencies, Llama3Rope(8.0, 1.0, 4.0, 128))
    path = to_gguf(folder, config, rope_factors=factors.numpy())
    theirs = their_logits(folder, ids)
    assert worst(our_logits(path, ids), theirs) < 1e-4
    without = to_gguf(folder, config)
    assert worst(our_logits(without, ids), theirs) > 1e-2, "the factors have no effect"


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        pytest.param({}, "llama", id="llama"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, "llama", id="llama, biases"),
        pytest.param(QWEN2, "qwen2", id="qwen2"),
        pytest.param(QWEN3, "qwen3", id="qwen3"),
        pytest.param(MIXTRAL, "llama", id="mixtral"),
    ],
)
def test_a_gguf_is_the_same_model(
    tiny_checkpoint: Callable[..., Path],
    to_gguf: Callable[..., Path],
    changes: dict[str, Any],
    architecture: str,
) -> None:
    """Of llama the rows of q and k are un-permuted, of Qwen they are not."""
    ids = list(range(50))
    folder = tiny_checkpoint(**changes)
    config = json.loads((folder / "config.json").read_text())
    path = to_gguf(folder, config, architecture=architecture)
    assert worst(our_logits(path, ids), their_logits(folder, ids)) < 1e-4
    assert torch.equal(our_logits(path, ids), our_logits(folder, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_transformers_gets(
    tiny_checkpoint: Callable[..., Path], dtype: torch.dtype
) -> None:
    ids = torch.randint(0, 101, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    folder = tiny_checkpoint()
    exact = their_logits(folder, ids)
    ours = (our_logits(folder, ids, dtype) - exact).std()
    theirs = (their_logits(folder, ids, dtype) - exact).std()
    assert ours <= 1.2 * theirs


def test_shards_are_one_model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate([names[::2], names[1::2]]):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part{shard}.safetensors")
        weight_map |= {name: f"part{shard}.safetensors" for name in part}
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ids = list(range(20))
    assert torch.equal(our_logits(tmp_path, ids), our_logits(folder, ids))
