"""Linear layers of fewer bits, and rows in fp8."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from tandem_runtime import kernels
from tandem_runtime.kernels.fp8_quantize import (
    FP8,
    fp8_quantize_reference,
    fp8_quantize_triton,
)
from tandem_runtime.kernels.int4_linear import int4_linear_reference, int4_linear_triton
from tandem_runtime.kernels.scaled_linear import scaled_linear_reference, scaled_linear_triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 16, 32), (5, 48, 160), (16, 112, 96), (17, 80, 288), (70, 16, 64)]
"""Rows, N, K"""


def bits(q: torch.Tensor) -> torch.Tensor:
    return q.cpu().view(torch.uint8)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bound", [inf, 2.5])
@pytest.mark.parametrize(("rows", "inner", "groups"), [(1, 64, 1), (7, 208, 1), (16, 384, 3)])
def test_rows_in_fp8(
    rows: int,
    inner: int,
    groups: int,
    bound: float,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    x = (torch.randn(rows, inner, generator=random) * 3).to(dtype)
    x[0] = 0.0
    q, s = fp8_quantize_triton(x.to(device), groups, bound)
    expected, scales = fp8_quantize_reference(x, groups, bound)
    assert len(q) == len(s) == -(-rows // 16) * 16
    assert torch.equal(s[:rows].cpu(), scales)
    assert torch.equal(bits(q[:rows]), bits(expected))
    assert not bits(q[rows:]).any()


def test_what_is_no_number_stays_none(device: torch.device) -> None:
    x = torch.ones(2, 64)
    x[1, 5] = nan
    q, s = fp8_quantize_triton(x.to(device))
    values = q[:2].float() * s[:2]
    assert bool(values[1, 5].isnan())
    assert not bool(values[0].isnan().any())


def test_fp8_is_at_most_a_sixteenth_off(random: torch.Generator) -> None:
    x = torch.randn(8, 256, generator=random)
    q, s = fp8_quantize_reference(x, 2)
    back = q.float().view(8, 2, 128) * s[..., None]
    off = (back - x.view(8, 2, 128)).abs()
    assert bool((off <= back.abs() / 16 + s[..., None] * 2**-10 * 1.001).all())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("form", ["fp8", "fp8 in groups", "int8"])
@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
def test_8_bits(
    rows: int,
    columns: int,
    inner: int,
    form: str,
    dtype: torch.dtype,
    has_bias: bool,
    device: torch.device,
    random: torch.Generator,
) -> None:
    inner, groups = (inner // 32 * 128, inner // 32) if "groups" in form else (inner, 1)
    x = torch.randn(rows, inner, generator=random).to(dtype)
    s = torch.rand(columns, groups, generator=random) / inner**0.5
    bias = torch.randn(columns, generator=random).to(dtype) if has_bias else None
    t = None
    if form == "int8":
        w = torch.randint(-127, 128, (columns, inner), generator=random, dtype=torch.int8)
        s = s.to(dtype) / 100
    else:
        w = torch.randn(columns, inner, generator=random).to(FP8)
        x, t = fp8_quantize_reference(x, groups)
    expected = scaled_linear_reference(x, w, s, bias, t, dtype)
    at = [None if tensor is None else tensor.to(device) for tensor in (x, w, s, bias, t)]
    y = scaled_linear_triton(at[0], at[1], at[2], at[3], at[4], dtype, rows)
    torch.testing.assert_close(y.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 70])
def test_fp8_from_rows_as_they_are(
    rows: int, has_bias: bool, device: torch.device, random: torch.Generator
) -> None:
    """On a GPU more than 16 rows are torch's product."""
    dtype = torch.bfloat16
    x = torch.randn(rows, 288, generator=random).to(dtype)
    w, s = fp8_quantize_reference(torch.randn(80, 288, generator=random) / 288**0.5)
    bias = torch.randn(80, generator=random).to(dtype) if has_bias else None
    q, t = fp8_quantize_reference(x)
    expected = scaled_linear_reference(q, w, s, bias, t, dtype)
    on_device = [tensor.to(device) for tensor in (x, w, s)]
    y = kernels.fp8_linear(*on_device, None if bias is None else bias.to(device), inf)
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y.cpu(), expected, **limits)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
def test_4_bits(
    rows: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    has_bias: bool,
    device: torch.device,
    random: torch.Generator,
) -> None:
    x = torch.randn(rows, inner, generator=random).to(dtype)
    q = torch.randint(0, 256, (columns, inner // 2), generator=random, dtype=torch.uint8)
    s = (torch.rand(columns, inner // 32, generator=random) / inner**0.5 / 5).to(dtype)
    z = (torch.randn(columns, inner // 32, generator=random) / inner**0.5).to(dtype)
    bias = torch.randn(columns, generator=random).to(dtype) if has_bias else None
    expected = int4_linear_reference(x, q, s, z, bias)
    given = [tensor.to(device) for tensor in (x, q, s, z)]
    y = int4_linear_triton(*given, None if bias is None else bias.to(device)).cpu()
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_4_bit_reference_follows_its_formula() -> None:
    q = torch.zeros(1, 16, dtype=torch.uint8)
    q[0, 3] = 0xF2  # column 3 is 2, column 19 is 15, all others 0
    w = [(0 - 8) * 0.5 + 1.0] * 32
    w[3], w[19] = (2 - 8) * 0.5 + 1.0, (15 - 8) * 0.5 + 1.0
    scale, zero = torch.full((1, 1), 0.5), torch.ones(1, 1)
    y = int4_linear_reference(torch.eye(32), q, scale, zero, None)
    assert y[:, 0].tolist() == w


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    x, w = torch.zeros(2, 64, device=device), torch.zeros(16, 64, dtype=torch.int8, device=device)
    s, q = torch.ones(16, 1, device=device), torch.zeros(16, 32, dtype=torch.uint8, device=device)
    groups = torch.ones(16, 2, device=device)
    for arguments, sentence in [
        ((x, w[:, :32].contiguous(), s), "x has 64 columns, w 32"),
        ((x, w.float(), s), "w is torch.float32, .* or torch.int8 needed"),
        ((x, w.to(FP8), s), "needs x of fp8 with scales, got torch.float32"),
        ((x, w, s[:8]), r"s is \(8, 1\), \(16, groups\) needed"),
        ((x[:, ::2], w[:, :32].contiguous(), s), "x has strides"),
        ((x, w, groups), "groups of 32 columns"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            scaled_linear_triton(*arguments, None, None, torch.float32, 2)
    for int4, sentence in [
        ((x, q[:, :16], groups, groups), r"q is \(16, 16\), x has 64 columns"),
        ((x, q.int(), groups, groups), r"q is torch\.int32, torch\.uint8 needed"),
        ((x, q, s, groups), r"s is \(16, 1\), \(16, 2\) needed"),
    ]:
        with pytest.raises(AssertionError, match=sentence):
            int4_linear_triton(*int4, None)
    with pytest.raises(AssertionError, match="65 columns cannot be 2 groups"):
        fp8_quantize_triton(torch.zeros(2, 65, device=device), 2)
