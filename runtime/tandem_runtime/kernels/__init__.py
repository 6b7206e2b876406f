"""Operators of the models: a Triton kernel where a GPU is, its torch reference elsewhere.

Every file holds one operator: formula and shapes, `*_reference` in torch (what the CPU runs), the
kernel, and its launcher, which checks dtypes, shapes and strides. Here is the choice between them.
Under TRITON_INTERPRET=1 Triton's interpreter runs the kernels on CPU tensors (for tests).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from tandem_runtime.kernels.attention_plan import GpuWork, Ints, Step, plan_gpu, upload
from tandem_runtime.kernels.cpu_attention import (
    CpuWork,
    paged_attention_cpu,
    plan_cpu,
    store_kv_cpu,
)
from tandem_runtime.kernels.cpu_blocks import gather_blocks_cpu, scatter_blocks_cpu
from tandem_runtime.kernels.fp8_quantize import fp8_quantize_triton
from tandem_runtime.kernels.gather_blocks import gather_blocks_triton, scatter_blocks_triton
from tandem_runtime.kernels.head_norm import head_norm_cpu, head_norm_triton
from tandem_runtime.kernels.int4_cpu import int4_linear_cpu as int4_linear_cpu
from tandem_runtime.kernels.int4_cpu import pack_int4 as pack_int4
from tandem_runtime.kernels.int4_linear import int4_linear_triton
from tandem_runtime.kernels.linear import linear_cpu as linear_cpu
from tandem_runtime.kernels.linear import pack_linear as pack_linear
from tandem_runtime.kernels.moe import (
    grouped_linear_reference,
    grouped_linear_triton,
    route_reference,
    route_triton,
)
from tandem_runtime.kernels.paged_attention import paged_attention_triton, query_tile_tokens
from tandem_runtime.kernels.rms_norm import rms_norm_cpu, rms_norm_triton
from tandem_runtime.kernels.rope import rope_cpu, rope_triton
from tandem_runtime.kernels.sampling import sample_reference, sample_triton
from tandem_runtime.kernels.scaled_linear import STREAMED_ROWS, scaled_linear_triton
from tandem_runtime.kernels.silu_mul import silu_mul_cpu, silu_mul_triton
from tandem_runtime.kernels.store_kv import store_kv_triton

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
AttentionWork = CpuWork | GpuWork
ExpertLinears = Tensor | Sequence[Callable[[Tensor], Tensor]]
"""One for each expert; stacked weights [experts, out, in] for the kernel."""


def uses_triton(device: torch.device) -> bool:
    """Whether tensors of this device go to the kernels."""
    return device.type == "cuda" or INTERPRETED


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """See rms_norm.py."""
    run = rms_norm_triton if uses_triton(x.device) else rms_norm_cpu
    return run(x, weight, eps, residual)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """See head_norm.py."""
    run = head_norm_triton if uses_triton(x.device) else head_norm_cpu
    run(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See rope.py."""
    run = rope_triton if uses_triton(x.device) else rope_cpu
    run(x, cos, sin)


def fp8_linear(x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None, bound: float) -> Tensor:
    """y of scaled_linear.py from rows as they are; on GPUs, and in the interpreter."""
    q, t = fp8_quantize_triton(x, s.shape[1], bound)
    rows = len(x)
    if not x.is_cuda or rows <= STREAMED_ROWS or s.shape[1] > 1 or x.dtype != torch.bfloat16:
        return scaled_linear_triton(q, w, s, bias, t, x.dtype, rows)
    y = torch._scaled_mm(q, w.t(), scale_a=t, scale_b=s.t(), out_dtype=x.dtype, use_fast_accum=True)
    return y[:rows] if bias is None else y[:rows].add_(bias)


def int8_linear(x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """y of scaled_linear.py; on GPUs, and in the interpreter."""
    return scaled_linear_triton(x, w, s, bias, None, x.dtype, len(x))


def int4_linear(x: Tensor, q: Tensor, s: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """y of int4_linear.py; on GPUs, and in the interpreter."""
    return int4_linear_triton(x, q, s, z, bias)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See silu_mul.py."""
    run = silu_mul_triton if uses_triton(gate_up.device) else silu_mul_cpu
    return run(gate_up)


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See moe.py."""
    run = route_triton if uses_triton(logits.device) else route_reference
    return run(logits, k)


def grouped_linear(x: Tensor, linears: ExpertLinears, experts: Tensor, share: int) -> Tensor:
    """See moe.py."""
    if isinstance(linears, Tensor):
        return grouped_linear_triton(x, linears, experts, share)
    return grouped_linear_reference(x, linears, experts, share)


def store_kv(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    """See store_kv.py."""
    run = store_kv_triton if uses_triton(kv.device) else store_kv_cpu
    run(kv, cache, slots)


def plan_attention(
    step: Step,
    *,
    heads: int,
    kv_heads: int,
    device: torch.device,
    dtype: torch.dtype,
    head: Ints | None = None,
) -> AttentionWork:
    """Lay a step out for `paged_attention` on this device; `head` goes to a GPU with it."""
    group = heads // kv_heads
    if uses_triton(device):
        return upload(plan_gpu(step, query_tile_tokens(group)), device, head)
    return plan_cpu(step)


def paged_attention(q: Tensor, cache: Tensor, work: AttentionWork, scale: float) -> Tensor:
    """See paged_attention.py."""
    if isinstance(work, CpuWork):
        return paged_attention_cpu(q, cache, work, scale)
    return paged_attention_triton(q, cache, work, scale)


def gather_blocks(cache: Tensor, block_ids: Tensor, start: int, tokens: int) -> Tensor:
    """See gather_blocks.py."""
    if uses_triton(cache.device):
        return gather_blocks_triton(cache, block_ids, start, tokens)
    return gather_blocks_cpu(cache, block_ids, start, tokens)


def scatter_blocks(page: Tensor, cache: Tensor, block_ids: Tensor, start: int) -> None:
    """See gather_blocks.py."""
    if uses_triton(cache.device):
        scatter_blocks_triton(page, cache, block_ids, start)
        return
    scatter_blocks_cpu(page, cache, block_ids, start)


def sample(logits: Tensor, controls: Tensor, keys: Tensor) -> Tensor:
    """See sampling.py."""
    run = sample_triton if uses_triton(logits.device) else sample_reference
    return run(logits, controls, keys)
