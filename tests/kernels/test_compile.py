"""Every launch compiles to machine code for an H100, on a machine without one.

The launchers run as they are, with tensors of realistic strides; instead of launching, each kernel
is compiled for sm_90 with the types and constants of that call. What a compiler can find (types,
shapes of tiles, shared memory, an operation that only the interpreter knows) is found here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from tandem_runtime.kernels.attention_plan import Step, plan_gpu, upload
from tandem_runtime.kernels.fp8_quantize import FP8, fp8_quantize_triton
from tandem_runtime.kernels.gather_blocks import (
    _move_kernel,
    gather_blocks_triton,
    scatter_blocks_triton,
)
from tandem_runtime.kernels.head_norm import head_norm_triton
from tandem_runtime.kernels.int4_linear import int4_linear_triton
from tandem_runtime.kernels.moe import grouped_linear_triton, route_triton
from tandem_runtime.kernels.paged_attention import paged_attention_triton, query_tile_tokens
from tandem_runtime.kernels.rms_norm import rms_norm_triton
from tandem_runtime.kernels.rope import rope_triton
from tandem_runtime.kernels.sampling import sample_triton
from tandem_runtime.kernels.scaled_linear import scaled_linear_triton
from tandem_runtime.kernels.silu_mul import silu_mul_triton
from tandem_runtime.kernels.store_kv import store_kv_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10
"""Shared memory that a block may have on an H100."""
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}
Compiled = dict[str, Any]


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    assert isinstance(value, float)
    return "fp32"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Kernels by name, as the launches of the test compile them."""
    done: Compiled = {}

    def compile_instead(
        self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kw: Any
    ) -> None:
        constants = {n: kw.pop(n) for n in list(kw) if n in self.arg_names}
        values = dict(zip(self.arg_names, args, strict=False)) | constants
        parameters = inspect.signature(self.fn).parameters
        constexprs = {n for n in values if "constexpr" in str(parameters[n].annotation)}
        signature = {n: "constexpr" if n in constexprs else type_of(v) for n, v in values.items()}
        indices = {(self.arg_names.index(n),): values[n] for n in constexprs}
        source = ASTSource(fn=self, signature=signature, constexprs=indices)
        kernel = triton.compile(source, target=H100, options=kw)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_BYTES
        done[self.fn.__name__] = kernel

    monkeypatch.setattr(JITFunction, "run", compile_instead)
    return done


@pytest.mark.parametrize("pool", [None, FP8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [
        pytest.param(32, 8, 128, id="llama 8B"),
        pytest.param(9, 3, 64, id="smollm2"),
        pytest.param(4, 4, 80, id="odd dim"),
    ],
)
def test_attention(
    compiled: Compiled,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    pool: torch.dtype | None,
) -> None:
    qkv = torch.zeros(70, heads + 2 * kv_heads, dim, dtype=dtype)
    cache = torch.zeros(2, 40, kv_heads, 16, dim, dtype=pool or dtype)
    step = Step([1, 1, 68], [300, 5, 100], [list(range(1, 20)), [20], list(range(21, 28))], 16)
    device = torch.device("cpu")
    tile = query_tile_tokens(heads // kv_heads)
    work = upload(plan_gpu(step, tile), device)
    paged_attention_triton(qkv[:, :heads], cache, work, dim**-0.5)
    assert set(compiled) == {"_prefill_kernel", "_decode_kernel", "_merge_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows(compiled: Compiled, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(3, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    rms_norm_triton(x, weight, 1e-5)
    rms_norm_triton(x, weight, 1e-5, x.clone())
    silu_mul_triton(torch.zeros(3, 2 * 14336, dtype=dtype))
    qkv = torch.zeros(3, 48, 128, dtype=dtype)
    rope_triton(qkv[:, :40], torch.zeros(3, 128), torch.zeros(3, 128))
    head_norm_triton(qkv[:, :40], torch.zeros(40, 128, dtype=dtype), 1e-5)
    cache = torch.zeros(2, 5, 8, 16, 128, dtype=dtype)
    store_kv_triton(qkv[:, 32:].view(3, 2, 8, 128), cache, torch.arange(3))
    store_kv_triton(qkv[:, 32:].view(3, 2, 8, 128), cache.to(FP8), torch.arange(3))
    assert set(compiled) == {
        "_rms_norm_kernel",
        "_silu_mul_kernel",
        "_rope_kernel",
        "_head_norm_kernel",
        "_store_kv_kernel",
    }


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts(compiled: Compiled, dtype: torch.dtype, rows: int) -> None:
    route_triton(torch.zeros(rows, 8, dtype=dtype), 2)
    x, w = torch.zeros(rows, 512, dtype=dtype), torch.zeros(8, 256, 512, dtype=dtype)
    grouped_linear_triton(x, w, torch.zeros(rows, 2, dtype=torch.int64), share=2)
    assert set(compiled) == {"_route_kernel", "_grouped_linear_kernel"}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_linears(
    compiled: Compiled, dtype: torch.dtype, rows: int, has_bias: bool
) -> None:
    x = torch.zeros(rows, 512, dtype=dtype)
    bias = torch.zeros(256, dtype=dtype) if has_bias else None
    for groups in (1, 4):
        q, t = fp8_quantize_triton(x, groups)
        w, s = torch.zeros(256, 512, dtype=FP8), torch.zeros(256, groups)
        scaled_linear_triton(q, w, s, bias, t, dtype, rows)
    int8 = torch.zeros(256, 512, dtype=torch.int8)
    scaled_linear_triton(x, int8, torch.zeros(256, 1, dtype=dtype), bias, None, dtype, rows)
    scales = torch.zeros(256, 16, dtype=dtype)
    int4_linear_triton(x, torch.zeros(256, 256, dtype=torch.uint8), scales, scales, bias)
    assert set(compiled) == {"_fp8_quantize_kernel", "_scaled_linear_kernel", "_int4_linear_kernel"}


def test_saturating_keeps_what_is_no_number(compiled: Compiled) -> None:
    fp8_quantize_triton(torch.zeros(3, 512), 1)
    kv, pool = torch.zeros(3, 2, 8, 128), torch.zeros(2, 5, 8, 16, 128, dtype=FP8)
    store_kv_triton(kv, pool, torch.arange(3))
    for kernel in compiled.values():
        # The plain instruction gives the other operand.
        assert "min.NaN." in kernel.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("move", ["gather", "scatter"])
def test_pages(compiled: Compiled, move: str, dtype: torch.dtype) -> None:
    cache = torch.zeros(2, 2, 20, 8, 16, 128, dtype=dtype)
    page = torch.zeros(2, 2, 8, 256, 128, dtype=dtype)
    blocks = torch.arange(16)
    moves: dict[str, Callable[[], object]] = {
        "gather": lambda: gather_blocks_triton(cache, blocks, 0, 256),
        "scatter": lambda: scatter_blocks_triton(page, cache, blocks, 0),
    }
    moves[move]()
    assert set(compiled) == {"_move_kernel"}


def test_pages_of_any_span_are_one_kernel() -> None:
    varying = {p.name for p in _move_kernel.params if p.do_not_specialize}
    assert varying == {"start", "tokens"}


def test_sampling(compiled: Compiled) -> None:
    keys = torch.zeros(3, 2, dtype=torch.int64)
    sample_triton(torch.zeros(3, 128256), torch.ones(3, 4), keys)
    assert set(compiled) == {"_sample_kernel"}
