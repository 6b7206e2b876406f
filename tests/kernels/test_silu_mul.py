"""SwiGLU's activation."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.silu_mul import silu_mul_cpu, silu_mul_reference, silu_mul_triton

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (5, 123), (3, 1024), (2, 1), (4, 2049)])
def test_kernels_equal_reference(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, random: torch.Generator
) -> None:
    gate_up = (torch.randn(rows, 2 * width, generator=random) * 4).to(dtype)
    y = silu_mul_triton(gate_up.to(device)).cpu()
    expected = silu_mul_reference(gate_up)
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y, expected, **limits)
    torch.testing.assert_close(silu_mul_cpu(gate_up), expected, **limits)


def test_far_values_stay_what_they_are_on_the_cpu() -> None:
    gate = torch.tensor([[-200.0, 200.0, -1e30, 1e30, float("nan"), float("inf")]])
    y = silu_mul_cpu(torch.cat((gate, torch.ones_like(gate)), 1))
    torch.testing.assert_close(
        y, silu_mul_reference(torch.cat((gate, torch.ones_like(gate)), 1)), equal_nan=True
    )


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="gate_up has 7 columns: gate and up need one width"):
        silu_mul_triton(torch.zeros(2, 7, device=device))
    with pytest.raises(AssertionError, match="needs contiguous rows"):
        silu_mul_triton(torch.zeros(2, 16, device=device)[:, :8])
