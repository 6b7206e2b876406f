"""Steps of an 8B-shaped model with random weights, host work included, against the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from tandem_runtime.checkpoint.config import ModelConfig
from tandem_runtime.engine.batch import Batch, SampleRow
from tandem_runtime.engine.runner import TorchRunner
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.kv.layout import KvLayout
from tandem_runtime.model.decoder import Decoder
from tandem_runtime.protocol import Sampling

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import Clock
from benchmarks.report import Target

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

    def rope_factors(self) -> None:
        return None


class RandomModel:
    """The model, its cache and what its steps must cost at least."""

    def __init__(self, clock: Clock, dtype: torch.dtype) -> None:
        self.config = TINY if clock.dry else LLAMA_8B
        weights = RandomWeights(self.config, clock.device, dtype)
        with torch.inference_mode():
            model = Decoder(self.config, weights, self.config.context_tokens, clock.device)
        config = self.config
        self.item_bytes = torch.empty(0, dtype=dtype).element_size()
        layout = KvLayout(
            config.layers, config.kv_heads, config.head_dim, str(dtype).rpartition(".")[2]
        )
        self.token_bytes = layout.token_bytes
        free = 64 << 20 if clock.dry else int(torch.cuda.mem_get_info()[0] * CACHE_SHARE)
        self.blocks = min(free // (layout.token_bytes * BLOCK_TOKENS), 1 << 16)
        cache = KvCache(layout, self.blocks, BLOCK_TOKENS, clock.device)
        self.runner = TorchRunner(model, cache, 4 if clock.dry else 256)
        self.runner.capture_graphs()

    def run(self, batch: Batch) -> None:
        """One step, until its tokens are here."""
        self.runner.collect(self.runner.launch(batch))

    @property
    def linear_parameters(self) -> int:
        """Weights that every row is multiplied with, the head's apart."""
        shapes = self.config.tensor_shapes()
        return sum(s[0] * s[1] for n, s in shapes.items() if "proj" in n)

    @property
    def head_parameters(self) -> int:
        return self.config.vocab_size * self.config.hidden

    def fits(self, streams: int, context: int) -> bool:
        return streams * -(-context // BLOCK_TOKENS) < self.blocks

    def bound_s(self, limits: Ceilings, streams: int, queries: int, context: int) -> float:
        """Sum over operators of max(bytes / bandwidth, FLOP / matmul rate); weights read once."""
        rows, attended = streams * queries, streams * queries * (context - queries / 2)

        def operator(bytes_: float, flop: float) -> float:
            return max(bytes_ / limits.bytes_per_s, flop / limits.matmul_flop_per_s)

        width = self.config.heads * self.config.head_dim * self.config.layers
        linears = operator(
            self.item_bytes * self.linear_parameters, 2 * self.linear_parameters * rows
        )
        head = operator(self.item_bytes * self.head_parameters, 2 * self.head_parameters * streams)
        attention = operator(self.token_bytes * streams * context, 4 * attended * width)
        return linears + head + attention


def batch_of(streams: int, queries: int, context: int) -> Batch:
    """`streams` sequences of `context` tokens, whose last `queries` are computed in this step."""
    width = -(-context // BLOCK_TOKENS)
    tables = [list(range(1 + s * width, 1 + (s + 1) * width)) for s in range(streams)]
    positions = list(range(context - queries, context))
    slots = [
        table[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS
        for table in tables
        for p in positions
    ]
    samples = [
        SampleRow((s + 1) * queries - 1, context, Sampling(max_tokens=1, seed=s))
        for s in range(streams)
    ]
    return Batch(
        token_ids=[(7 * i) % 256 for i in range(streams * queries)],
        positions=positions * streams,
        slots=slots,
        query_tokens=[queries] * streams,
        context_tokens=[context] * streams,
        block_tables=tables,
        samples=samples,
    )


def step_targets(clock: Clock, limits: Ceilings, model: RandomModel) -> Iterator[Target]:
    """Decode from token to token, then a prefill chunk; the caller's clock, not the GPU's."""
    if clock.dry:
        shapes, prefill = [(1, 32), (3, 64)], 40
    else:
        shapes = [(b, c) for b in (1, 8, 32, 64, 128, 256) for c in (256, 1024, 4096)]
        prefill = 2048
    for streams, context in shapes:
        if not model.fits(streams, context):
            continue
        batch = batch_of(streams, 1, context)
        seconds = clock.wall_s(partial(model.run, batch))
        ratio = seconds / model.bound_s(limits, streams, 1, context)
        yield Target(f"decode step, {streams} x {context}: time over roofline", ratio, 1.15)
    batch = batch_of(1, prefill, prefill)
    seconds = clock.wall_s(lambda: model.run(batch))
    share = model.bound_s(limits, 1, prefill, prefill) / seconds
    yield Target(f"prefill of {prefill}: share of the matmul ceiling", share, 0.70, "at least")


def idle_target(clock: Clock, model: RandomModel) -> Target:
    """How long the GPU waits for the host in a decode step of 32 x 1024."""
    from torch.profiler import ProfilerActivity, profile

    batch = batch_of(2, 1, 32) if clock.dry else batch_of(32, 1, 1024)
    seconds = clock.wall_s(lambda: model.run(batch))
    if clock.dry:
        return Target("GPU idle in a decode step, us", 0.0, None)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        model.run(batch)
    busy_us = sum(event.self_device_time_total for event in trace.key_averages())
    return Target("GPU idle in a decode step, us", max(0.0, seconds * 1e6 - busy_us), 50)
