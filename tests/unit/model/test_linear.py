"""Linear layers: each row is its own, bit for bit, and as exact as torch's."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.model.linear import Linear
from torch.nn import functional

SHAPES = [(576, 960), (576, 3072), (1536, 576), (64, 101), (384, 96), (1536, 96), (2048, 512)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 31, 32, 33, 64, 65, 128, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_row_does_not_depend_on_how_many_there_are(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    linear = Linear(
        torch.randn(outputs, inputs, generator=random).to(dtype),
        torch.randn(outputs, generator=random).to(dtype),
    )
    x = torch.randn(256, inputs, generator=random).to(dtype)
    whole = linear(x)
    for rows in ROWS:
        for start in range(0, len(x) - rows + 1, rows):
            part = slice(start, start + rows)
            assert torch.equal(linear(x[part]), whole[part]), f"{rows} rows from {start}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_right(rows: int, dtype: torch.dtype, has_bias: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn(40, 72, generator=random)
    x = torch.randn(rows, 72, generator=random)
    bias = torch.randn(40, generator=random).to(dtype) if has_bias else None
    y = Linear(weight.to(dtype), bias)(x.to(dtype))
    exact = functional.linear(x.to(dtype).double(), weight.to(dtype).double())
    exact += 0.0 if bias is None else bias.double()
    assert y.shape == (rows, 40)
    assert y.dtype == dtype
    # Rounded once at the end; the sum is a float32's.
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
