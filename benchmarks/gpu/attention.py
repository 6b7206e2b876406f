"""Paged attention against memory bandwidth (decode) and against torch's best (prefill)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from tandem_runtime.kernels.attention_plan import Step, plan_gpu, upload
from tandem_runtime.kernels.paged_attention import paged_attention_triton, query_tile_tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.roofline import Points
from benchmarks.gpu.timing import Clock
from benchmarks.report import Target

BLOCK_TOKENS: Final = 16
DECODE_KV_BYTES: Final = 2 * 10**9
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads and head dim of a model."""

    heads: int
    kv_heads: int
    dim: int


LLAMA_8B = Heads(32, 8, 128)
SMALL_HEADS = Heads(32, 8, 64)


def make_step(query_tokens: list[int], context_tokens: list[int], seed: int = 0) -> Step:
    """Sequences whose blocks lie anywhere in the pool."""
    counts = [-(-context // BLOCK_TOKENS) for context in context_tokens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) + 1
    ids = iter(order.tolist())
    tables = [[next(ids) for _ in range(count)] for count in counts]
    return Step(query_tokens, context_tokens, tables, BLOCK_TOKENS)


class Case:
    """One layer's attention on random data; decode steps read 2 GB of KV, several layers' if need
    be, so that no cache holds any of it."""

    def __init__(self, clock: Clock, heads: Heads, step: Step, dtype: torch.dtype) -> None:
        blocks = 1 + sum(len(table) for table in step.block_tables)
        shape = (2, blocks, heads.kv_heads, BLOCK_TOKENS, heads.dim)
        rows = sum(step.query_tokens)
        self.q = torch.randn(rows, heads.heads, heads.dim, device=clock.device, dtype=dtype)
        token_bytes = 2 * heads.kv_heads * heads.dim * self.q.element_size()
        self.read_bytes = sum(step.context_tokens) * token_bytes
        once = clock.dry or step.decodes == 0
        layers = 1 if once else -(-DECODE_KV_BYTES // self.read_bytes)
        self.caches = [torch.randn(shape, device=clock.device, dtype=dtype) for _ in range(layers)]
        tile = query_tile_tokens(heads.heads // heads.kv_heads)
        self.work = upload(plan_gpu(step, tile), clock.device)
        pairs = zip(step.query_tokens, step.context_tokens, strict=True)
        seen = sum(q * (c - (q - 1) / 2) for q, c in pairs)
        self.flop = 4.0 * heads.heads * heads.dim * seen
        self._scale, self._clock = heads.dim**-0.5, clock

    def run(self) -> None:
        """Every layer, one after the other."""
        for cache in self.caches:
            paged_attention_triton(self.q, cache, self.work, self._scale)

    def seconds(self, repeats: int = 15) -> float:
        """Of one layer."""
        return self._clock.kernel_s(self.run, repeats) / len(self.caches)


def gathered_attention(q: Tensor, cache: Tensor, tables: Tensor) -> Tensor:
    """Decode as torch does it without a kernel for it: copy the blocks together, then SDPA.

    q: [streams, heads, dim], one row of each; tables: [streams, blocks], all full.
    """
    streams, (_, _, kv_heads, _, dim) = len(q), cache.shape
    k, v = (plane[tables].transpose(1, 2).reshape(streams, kv_heads, -1, dim) for plane in cache)
    return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def decode_targets(
    clock: Clock, ceilings: Ceilings, points: Points, dtype: torch.dtype
) -> Iterator[Target]:
    """Share of the bandwidth, uniform and ragged."""
    cases = {
        "128 x 4096": ([4096] * 128, 0.90),
        "1 x 65536 + 63 x 512": ([65536] + [512] * 63, 0.85),
    }
    if clock.dry:
        cases = {"2 x 48": ([48, 48], 0.90), "300 + 40": ([300, 40], 0.85)}
    for name, (contexts, bound) in cases.items():
        step = make_step([1] * len(contexts), contexts)
        case = Case(clock, LLAMA_8B, step, dtype)
        seconds = case.seconds()
        points.add(f"decode attention, {name}", case.flop, case.read_bytes, seconds)
        share = case.read_bytes / seconds / ceilings.bytes_per_s
        yield Target(f"decode attention, {name}: share of bandwidth", share, bound, "at least")
        if len(set(contexts)) == 1:
            tables = torch.tensor(step.block_tables, device=clock.device)
            peer = gathered_attention if clock.dry else torch.compile(gathered_attention)
            peer_s = clock.kernel_s(partial(peer, case.q, case.caches[0], tables), repeats=5)
            ratio = peer_s / seconds
            yield Target(
                f"decode attention, {name}: torch.compile's time over ours", ratio, None, "at least"
            )


def prefill_targets(clock: Clock, points: Points, dtype: torch.dtype) -> Iterator[Target]:
    """Torch's best time over ours, for whole prompts and for a chunk over earlier context."""
    cases = [(2048, 2048), (4096, 4096), (8192, 8192), (16384, 16384), (2048, 10240)]
    for heads, bound in ((LLAMA_8B, 0.8), (SMALL_HEADS, 1.0)):
        for queries, context in [(40, 40), (20, 60)] if clock.dry else cases:
            step = make_step([queries], [context])
            case = Case(clock, heads, step, dtype)
            seconds = case.seconds(repeats=7)
            best = _best_sdpa_s(clock, heads, queries, context, dtype)
            name = f"prefill attention, head dim {heads.dim}, {queries} of {context}"
            points.add(name, case.flop, case.read_bytes, seconds)
            yield Target(f"{name}: SDPA's time over ours", best / seconds, bound, "at least")


def _best_sdpa_s(
    clock: Clock, heads: Heads, queries: int, context: int, dtype: torch.dtype
) -> float:
    def random(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, count, tokens, heads.dim, device=clock.device, dtype=dtype)

    q, k, v = (
        random(heads.heads, queries),
        random(heads.kv_heads, context),
        random(heads.kv_heads, context),
    )
    whole = queries == context
    mask = None if whole else causal_lower_right(queries, context)
    group = heads.heads // heads.kv_heads
    wide = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    times = []
    for backend in (SDPBackend.MATH,) if clock.dry else BACKENDS:
        # Not every backend takes fewer heads of keys than of queries.
        for keys, values, gqa in ((k, v, True), (*wide, False)):

            def attend(keys: Tensor = keys, values: Tensor = values, gqa: bool = gqa) -> Tensor:
                return scaled_dot_product_attention(
                    q, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=gqa
                )

            try:
                with sdpa_kernel(backend):
                    times.append(clock.kernel_s(attend, repeats=7))
            except RuntimeError:
                continue  # this backend does not take these shapes
    if not times:
        raise RuntimeError("no backend of scaled_dot_product_attention took the shapes")
    return min(times)
