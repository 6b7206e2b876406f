"""What an engine step takes on a replica: a roofline of each kind of operator.

A step multiplies all its tokens with the weights (linear layers), then each token with its own
context (attention), layer by layer. Each kind takes the longer of its FLOP over FLOP/s and its
bytes over bytes/s; the kinds follow one another, so their times add up:

    linear    = max(2 x params x tokens / FLOP/s, weight bytes / bytes/s)
    attention = max(4 x layers x width x pairs / FLOP/s, KV bytes / bytes/s)
    step      = linear + attention + all-reduces + overhead

`pairs` counts (token, earlier token) pairs: causal attention, so a prompt of S has S^2 / 2.
Efficiencies say which share of the data sheet an engine reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from tandem_runtime.roofline.errors import RooflineError
from tandem_runtime.roofline.gpus import Gpu
from tandem_runtime.roofline.model import KV_BYTES, ServedModel

ACTIVATION_BYTES: Final = 2.0
_ALL_REDUCES_PER_LAYER: Final = 2


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet. An H100 was measured at 0.81 (matrix products) and 0.90 (copies);
    an engine's whole step reaches less."""

    compute: float = 0.6
    memory: float = 0.8
    link: float = 0.7
    step_overhead_s: float = 0.001
    """Planning, launches and sampling that nothing hides."""

    def __post_init__(self) -> None:
        for name in ("compute", "memory", "link"):
            if not 0 < getattr(self, name) <= 1:
                raise RooflineError(f"{name} efficiency is {getattr(self, name)}: give 0 to 1")
        if not 0 <= self.step_overhead_s < math.inf:
            raise RooflineError(f"step overhead is {self.step_overhead_s} s: give at least 0")


@dataclass(frozen=True)
class Memory:
    """How a GPU's memory is shared out."""

    kv_share: float = 0.9
    """Of what weights and reserve leave; a fleet's cache tier of medium Accelerator."""
    reserve_bytes: float = 3e9
    """For activations, graphs and libraries."""


@dataclass(frozen=True)
class Replica:
    """A model on so many GPUs of a node, which share it by tensor parallelism."""

    model: ServedModel
    gpu: Gpu
    gpus: int
    efficiency: Efficiency = field(default_factory=Efficiency)
    memory: Memory = field(default_factory=Memory)

    # -- memory ------------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> float:
        """Of one GPU, beside weights and reserve; negative where the weights do not fit."""
        weights = self.model.weight_bytes / self.gpus
        return self.gpu.memory_bytes - self.memory.reserve_bytes - weights

    @property
    def kv_token_bytes_of_gpu(self) -> float:
        """A token's KV on each GPU; GPUs beyond the kv heads hold copies."""
        shape = self.model.shape
        heads = max(shape.kv_heads / self.gpus, 1.0)
        return 2 * shape.layers * heads * shape.head_dim * KV_BYTES[self.model.kv_cache]

    @cached_property
    def kv_capacity_tokens(self) -> int:
        """Tokens whose KV fits beside the weights."""
        usable = max(self.free_bytes, 0.0) * self.memory.kv_share
        return int(usable / self.kv_token_bytes_of_gpu)

    # -- speed -------------------------------------------------------------------------------------

    @property
    def flop_per_s(self) -> float:
        """Reached in linear layers by all GPUs together."""
        fp8 = self.gpu.fp8_flop_per_s if self.model.weights == "fp8" else None
        return self.gpus * (fp8 or self.gpu.bf16_flop_per_s) * self.efficiency.compute

    @property
    def attention_flop_per_s(self) -> float:
        """Attention is computed in bf16, whatever the weights' format."""
        return self.gpus * self.gpu.bf16_flop_per_s * self.efficiency.compute

    @property
    def bytes_per_s(self) -> float:
        """Memory bandwidth reached by all GPUs together."""
        return self.gpus * self.gpu.memory_bytes_per_s * self.efficiency.memory

    def linear_s(self, tokens: float, sampled: float) -> float:
        """Linear layers over `tokens`, the head over those that are `sampled`."""
        shape = self.model.shape
        flop = 2 * (shape.layer_params * tokens + shape.head_params * sampled)
        return max(flop / self.flop_per_s, self.model.read_bytes(tokens) / self.bytes_per_s)

    def attention_s(self, pairs: float, context_tokens: float) -> float:
        """Attention over `pairs`, which reads the KV of `context_tokens`."""
        shape = self.model.shape
        flop = 4 * shape.layers * shape.attention_width * pairs
        read = context_tokens * self.kv_token_bytes_of_gpu * self.gpus
        return max(flop / self.attention_flop_per_s, read / self.bytes_per_s)

    def fixed_s(self, tokens: float) -> float:
        """All-reduces of a step over `tokens`, and its overhead."""
        overhead = self.efficiency.step_overhead_s
        if self.gpus == 1:
            return overhead
        shape = self.model.shape
        each_bytes = tokens * shape.hidden * ACTIVATION_BYTES
        moved = 2 * (self.gpus - 1) / self.gpus * each_bytes
        link = self.gpu.link_bytes_per_s * self.efficiency.link
        reduces = _ALL_REDUCES_PER_LAYER * shape.layers
        return overhead + reduces * (self.gpu.collective_latency_s + moved / link)

    # -- steps -------------------------------------------------------------------------------------

    def step_s(
        self,
        *,
        prompt_tokens: float = 0,
        prompt_pairs: float = 0,
        prompt_context_tokens: float = 0,
        decodes: float = 0,
        decode_context_tokens: float = 0,
    ) -> float:
        """A step of chunks of prompts and of `decodes` streams of so much context together."""
        tokens = prompt_tokens + decodes
        return (
            self.linear_s(tokens, max(decodes, 1.0))
            + self.attention_s(prompt_pairs, prompt_context_tokens)
            + self.attention_s(decode_context_tokens, decode_context_tokens)
            + self.fixed_s(tokens)
        )

    def decode_s(self, streams: float, context_tokens: float) -> float:
        """One token for each of `streams`, whose contexts sum up to `context_tokens`."""
        return self.step_s(decodes=streams, decode_context_tokens=context_tokens)

    def decode_token_s(self) -> float:
        """What one more token of context adds to a decode step: the step is linear in it."""
        return self.attention_s(1.0, 1.0)

    def prompt_s(self, uncached_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
        """A prompt alone, in chunks, behind a prefix whose KV is there already."""
        total_s, done = 0.0, 0
        while done < uncached_tokens:
            chunk = min(chunk_tokens, uncached_tokens - done)
            before = cached_tokens + done
            total_s += self.step_s(
                prompt_tokens=chunk,
                prompt_pairs=chunk * before + chunk * chunk / 2,
                prompt_context_tokens=before + chunk,
            )
            done += chunk
        return total_s
