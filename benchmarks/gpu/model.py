"""An 8B-shaped model with random weights, engines around it, and what its steps cost at least."""

from __future__ import annotations

import gc
import inspect
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.blocks import BlockPool
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.flight import Runner
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.engine.scheduler import GROWTH_RESERVE_TOKENS, Scheduler
from tandem_runtime.engine.sequence import Request, SampledToken
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.protocol import Sampling

from benchmarks.gpu.ceilings import Ceilings, Matmuls
from benchmarks.gpu.timing import Clock

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    context_tokens=8192,
    rms_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=None,
    tied_embeddings=False,
    eos_token_ids=(),
)
TINY = replace(
    LLAMA_8B, layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab_size=300
)
BLOCK_TOKENS = 16
CACHE_SHARE = 0.85
"""Of the memory that is left beside the weights."""


@dataclass(frozen=True)
class RandomWeights:
    """A checkpoint that nobody trained."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def load(self, name: str) -> torch.Tensor:
        shape = self.config.tensor_shapes()[name]
        return torch.randn(shape, device=self.device, dtype=self.dtype) * 0.02

    def quantized(self, name: str) -> None:
        return None

    def rope_factors(self) -> None:
        return None


@dataclass(frozen=True)
class StepShape:
    """What a step computes, as far as its cost depends on it."""

    query_tokens: list[int]
    context_tokens: list[int]
    samples: int


class RandomModel:
    """The model, its cache and its runner; its memory is free when nobody refers to it.

    Raises:
        ValueError: this version does not know `quantization`.
    """

    def __init__(
        self, clock: Clock, dtype: torch.dtype, max_running: int = 256, quantization: str = "none"
    ) -> None:
        self.config = config = TINY if clock.dry else LLAMA_8B
        self.max_running = min(max_running, 4) if clock.dry else max_running
        self.clock = clock
        free_memory()
        weights = RandomWeights(config, clock.device, dtype)
        model = _decoder(config, weights, clock.device, quantization)
        self.item_bytes = torch.empty(0, dtype=dtype).element_size()
        self.layout = KvLayout(
            config.layers, config.kv_heads, config.head_dim, str(dtype).rpartition(".")[2]
        )
        block_bytes = self.layout.token_bytes * BLOCK_TOKENS
        if clock.dry:
            free = 4 << 20
        else:
            torch.cuda.empty_cache()
            free = int(torch.cuda.mem_get_info()[0] * CACHE_SHARE)
        self.blocks = min(free // block_bytes, 1 << 16)
        cache = KvCache(self.layout, self.blocks, BLOCK_TOKENS, clock.device)
        # So that steps whose prompts were not computed attend to something.
        cache.data.normal_()
        self.runner = TorchRunner(model, cache, self.max_running)
        self.runner.capture_graphs()

    def engine(self, runner: Runner, max_batch_tokens: int) -> Engine:
        """With an empty queue. Engines that follow each other share the cache's memory."""
        scheduler = Scheduler(
            BlockPool(self.blocks),
            block_tokens=BLOCK_TOKENS,
            max_batch_tokens=max_batch_tokens,
            max_running=self.max_running,
        )
        # As build_engine does: the collector need not walk what lives on.
        gc.collect()
        gc.freeze()
        return Engine(
            scheduler,
            runner,
            layout=self.layout,
            layout_hash=b"random",
            vocab_size=self.config.vocab_size,
            max_context_tokens=self.config.context_tokens,
            eos_token_ids=frozenset(),
        )

    def add(self, engine: Engine, count: int, prompt_tokens: int, max_tokens: int) -> None:
        """Streams with prompts that have nothing in common."""
        ids = range(self.config.vocab_size)
        for index in range(count):
            prompt = random.Random(index).choices(ids, k=prompt_tokens)
            sampling = Sampling(max_tokens, temperature=1.0, seed=index)
            engine.add(Request(f"{index}", prompt, sampling))

    def fits(self, streams: int, context: int, steps: int) -> bool:
        """Whether so many streams run together for so many steps."""
        tokens = context + max(steps, GROWTH_RESERVE_TOKENS)
        return streams <= self.max_running and streams * -(-tokens // BLOCK_TOKENS) < self.blocks

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of one layer's products."""
        c = self.config
        width = c.heads * c.head_dim
        return [
            (c.hidden, width + 2 * c.kv_heads * c.head_dim),
            (width, c.hidden),
            (c.hidden, 2 * c.intermediate),
            (c.intermediate, c.hidden),
        ]

    def attention_flop(self, shape: StepShape) -> float:
        """Of all layers; a row sees its own token and those before."""
        width = self.config.heads * self.config.head_dim * self.config.layers
        pairs = zip(shape.query_tokens, shape.context_tokens, strict=True)
        return 4.0 * width * sum(q * (c - (q - 1) / 2) for q, c in pairs)

    def flop(self, shape: StepShape) -> float:
        """Of a step, the head's for sampled rows alone."""
        per_row = self.config.layers * sum(n_in * n_out for n_in, n_out in self.linears)
        head = self.config.vocab_size * self.config.hidden * shape.samples
        return 2.0 * (per_row * sum(shape.query_tokens) + head) + self.attention_flop(shape)

    def read_bytes(self, shape: StepShape) -> float:
        """That a step must read: weights once, and the KV of its streams."""
        c = self.config
        weights = c.layers * sum(n_in * n_out for n_in, n_out in self.linears)
        weights += c.vocab_size * c.hidden if shape.samples else 0
        kv = self.layout.token_bytes * sum(shape.context_tokens)
        return float(self.item_bytes * weights + kv)

    def bound_s(self, limits: Ceilings, matmuls: Matmuls, shape: StepShape) -> float:
        """Sum over operators of max(bytes / bandwidth, FLOP / matmul rate measured at that size).

        Weights are read once; everything that works row by row is left out.
        """
        config, rows = self.config, sum(shape.query_tokens)
        products = [(n_in, n_out, rows, config.layers) for n_in, n_out in self.linears]
        if shape.samples:
            products.append((config.hidden, config.vocab_size, shape.samples, 1))
        total = 0.0
        for n_in, n_out, count, times in products:
            read_s = self.item_bytes * n_in * n_out / limits.bytes_per_s
            total += times * max(read_s, matmuls.seconds(count, n_in, n_out))
        kv_bytes = self.layout.token_bytes * sum(shape.context_tokens)
        attention_s = self.attention_flop(shape) / limits.matmul_flop_per_s
        return total + max(kv_bytes / limits.bytes_per_s, attention_s)


def _decoder(
    config: ModelConfig, weights: RandomWeights, device: torch.device, quantization: str
) -> Decoder:
    options = {}
    if quantization != "none":
        if "quantization" not in inspect.signature(Decoder).parameters:
            raise ValueError(f"this version has no {quantization} weights")
        options["quantization"] = quantization
    return Decoder(config, weights, config.context_tokens, device, **options)  # type: ignore[arg-type,unused-ignore]


def free_memory() -> None:
    """What nobody refers to is the device's again."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class SkipsPrompts:
    """A runner that computes decode steps alone: long contexts are there at once. Their KV is what
    the cache happens to hold, on which no time depends."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.overlaps = runner.overlaps
        self.reads_beside = runner.reads_beside
        self.read_kv, self.write_kv = runner.read_kv, runner.write_kv
        self.read_beside = runner.read_beside

    def launch(self, batch: Batch) -> Any:
        """See `flight.Runner`."""
        prompts = batch.decodes < len(batch.query_tokens)
        return len(batch.samples) if prompts else self.runner.launch(batch)

    def collect(self, launched: Any) -> list[SampledToken | None]:
        """See `flight.Runner`."""
        if isinstance(launched, int):
            return [SampledToken(0)] * launched
        return self.runner.collect(launched)

    def close(self) -> None:
        """Nothing of its own to end."""


class Watched(SkipsPrompts):
    """A runner that computes everything and keeps what each step's cost depends on."""

    def __init__(self, runner: TorchRunner) -> None:
        super().__init__(runner)
        self.shapes: list[StepShape] = []

    def launch(self, batch: Batch) -> Any:
        """See `flight.Runner`."""
        self.shapes.append(StepShape(batch.query_tokens, batch.context_tokens, len(batch.samples)))
        return self.runner.launch(batch)
