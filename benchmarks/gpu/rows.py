"""The operators that work row by row, against memory bandwidth and their compiled references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from tandem_runtime.kernels.gather_blocks import gather_blocks_triton
from tandem_runtime.kernels.rms_norm import rms_norm_reference, rms_norm_triton
from tandem_runtime.kernels.rope import rope_reference, rope_triton
from tandem_runtime.kernels.sampling import noise_keys, sample_reference, sample_triton
from tandem_runtime.kernels.silu_mul import silu_mul_reference, silu_mul_triton
from tandem_runtime.kernels.store_kv import store_kv_reference, store_kv_triton

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.roofline import Points
from benchmarks.gpu.timing import Clock
from benchmarks.report import Target


class Case(NamedTuple):
    """An operator on one input."""

    name: str
    moved_bytes: int
    run: Callable[[], object]
    reference: Callable[[], object] | None


def row_targets(
    clock: Clock, ceilings: Ceilings, points: Points, dtype: torch.dtype
) -> Iterator[Target]:
    """Share of the bandwidth of each, and its time against torch.compile of its reference."""
    for case in _cases(clock, dtype):
        seconds = clock.kernel_s(case.run)
        share = case.moved_bytes / seconds / ceilings.bytes_per_s
        # A handful of operations an element, which no roof but bandwidth's limits.
        points.add(f"row by row, {case.name}", case.moved_bytes, case.moved_bytes, seconds)
        yield Target(f"{case.name}: share of bandwidth", share, None, "at least")
        if case.reference is not None:
            peer = case.reference if clock.dry else torch.compile(case.reference)
            ratio = clock.kernel_s(peer) / seconds
            yield Target(f"{case.name}: torch.compile's time over ours", ratio, None, "at least")


def _cases(clock: Clock, dtype: torch.dtype) -> Iterator[Case]:
    device = clock.device
    rows, hidden, inner, vocabulary = (3, 64, 96, 300) if clock.dry else (8192, 4096, 14336, 128256)
    heads, kv_heads, dim, blocks = (4, 2, 16, 20) if clock.dry else (32, 8, 128, 4096)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)
    item = x.element_size()
    yield Case(
        "RMSNorm with residual",
        4 * x.numel() * item,
        lambda: rms_norm_triton(x, weight, 1e-5, residual),
        lambda: rms_norm_reference(x, weight, 1e-5, residual),
    )
    gate_up = random(rows, 2 * inner)
    yield Case(
        "SiLU-mul",
        3 * rows * inner * item,
        lambda: silu_mul_triton(gate_up),
        lambda: silu_mul_reference(gate_up),
    )
    qkv = random(rows, heads + 2 * kv_heads, dim)
    cos, sin = (torch.randn(rows, dim, device=device) for _ in range(2))
    turned = qkv[:, : heads + kv_heads]
    yield Case(
        "rope",
        2 * turned.numel() * item,
        lambda: rope_triton(turned, cos, sin),
        lambda: rope_reference(turned, cos, sin),
    )
    cache = random(2, blocks, kv_heads, 16, dim)
    slots = torch.randperm(16 * blocks - 16, device=device)[:rows] + 16
    kv = qkv[:, heads:].view(rows, 2, kv_heads, dim)
    yield Case(
        "KV store",
        2 * kv.numel() * item,
        lambda: store_kv_triton(kv, cache, slots),
        lambda: store_kv_reference(kv, (cache[0], cache[1]), slots),
    )
    pool = cache[None]
    taken = torch.randperm(blocks - 1, device=device)[:16] + 1
    yield Case(
        "block gather, one page of a layer",
        2 * 2 * kv_heads * 256 * dim * item,
        lambda: gather_blocks_triton(pool, taken, 0, 256),
        None,
    )
    yield from _sampling(clock, 4 if clock.dry else 64, vocabulary)


def _sampling(clock: Clock, streams: int, vocabulary: int) -> Iterator[Case]:
    device = clock.device
    logits = torch.randn(streams, vocabulary, device=device)
    keys = torch.tensor([noise_keys(s, 1) for s in range(streams)], device=device)
    for name, share in (("sampling", 1.0), ("sampling, top-p 0.9", 0.9)):
        controls = torch.tensor([[0.8, 0.0, share, math.inf]] * streams, device=device)
        yield Case(
            name,
            logits.numel() * 4,
            partial(sample_triton, logits, controls, keys),
            partial(sample_reference, logits, controls, keys),
        )
