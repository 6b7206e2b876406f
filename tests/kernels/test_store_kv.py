"""Putting keys and values into their slots."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.cpu_attention import store_kv_cpu, unpack
from tandem_runtime.kernels.store_kv import store_kv_reference, store_kv_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "block"), [(1, 3, 64, 16), (9, 2, 80, 4), (5, 1, 3, 8)]
)
def test_kernel_equals_reference(
    rows: int,
    heads: int,
    dim: int,
    block: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    wide = torch.randn(rows, 5 + 2 * heads, dim, generator=random).to(dtype)
    slots = torch.randperm(6 * block, generator=random)[:rows]
    expected = torch.zeros(2, 6, heads, block, dim, dtype=dtype)
    cache = expected.to(device, copy=True)
    kv = wide.to(device)[:, 5:].view(rows, 2, heads, dim)
    store_kv_triton(kv, cache, slots.to(device))
    store_kv_reference(wide[:, 5:].view(rows, 2, heads, dim), expected, slots)
    assert torch.equal(cache.cpu(), expected)
    laid = torch.zeros_like(expected)
    kv = wide[:, 5:].view(rows, 2, heads, dim)
    if dim % 2 and dtype != torch.float32:
        with pytest.raises(AssertionError, match="a head of 3 has no whole words of 2"):
            store_kv_cpu(kv, laid, slots)
    else:
        store_kv_cpu(kv, laid, slots)
        assert torch.equal(unpack(laid), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_pool_of_fp8_saturates(
    dtype: torch.dtype, device: torch.device, random: torch.Generator
) -> None:
    kv = (torch.randn(5, 2, 3, 16, generator=random) * 20).to(dtype)
    kv[1, 0, 0, :3] = torch.tensor([3000.0, -3000.0, 449.0])
    slots = torch.randperm(48, generator=random)[:5]
    expected = torch.zeros(2, 6, 3, 8, 16, dtype=torch.float8_e4m3fn)
    cache = expected.to(device, copy=True)
    store_kv_triton(kv.to(device), cache, slots.to(device))
    store_kv_reference(kv, expected.unbind(), slots)
    assert torch.equal(cache.cpu().view(torch.uint8), expected.view(torch.uint8))
    laid = torch.zeros_like(expected)
    store_kv_cpu(kv, laid, slots)
    assert torch.equal(unpack(laid).view(torch.uint8), expected.view(torch.uint8))
    row = expected[0, slots[1] // 8, 0, slots[1] % 8].float()
    assert row[:3].tolist() == [448.0, -448.0, 448.0]
    torch.testing.assert_close(row[3:], kv[1, 0, 0, 3:].float(), rtol=2**-4, atol=2**-10)


def test_reference_follows_its_formula(random: torch.Generator) -> None:
    kv = torch.randn(3, 2, 2, 4, generator=random)
    cache, slots = torch.zeros(2, 3, 2, 8, 4), [9, 2, 23]
    store_kv_reference(kv, cache, torch.tensor(slots))
    for row, slot in enumerate(slots):
        assert torch.equal(cache[:, slot // 8, :, slot % 8], kv[row])
    assert cache.count_nonzero() == kv.numel()


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    kv = torch.zeros(4, 2, 3, 8, device=device)
    cache = torch.zeros(2, 5, 3, 16, 8, device=device)
    slots = torch.zeros(4, dtype=torch.int64, device=device)
    for bad, sentence in [
        ((kv[:, :, :2], cache, slots), "kv has 2 heads, the cache 3"),
        ((kv[..., :4], cache, slots), "kv has head dim 4, the cache 8"),
        ((kv.half(), cache, slots), r"kv is torch\.float16, the cache torch\.float32"),
        ((kv, cache[:, ::2], slots), "must be contiguous"),
        ((kv, cache, slots[:3]), r"\(3,\) slots for 4 rows"),
        ((kv, cache, slots.int()), r"slots are torch\.int32, int64 needed"),
        ((kv[:, :1], cache, slots), r"\[rows, 2, heads, dim\] needed"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            store_kv_triton(*bad)
