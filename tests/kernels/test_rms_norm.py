"""RMSNorm, with and without residual."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.rms_norm import rms_norm_cpu, rms_norm_reference, rms_norm_triton

SHAPES = [(1, 576), (3, 1), (5, 33), (7, 1024), (2, 1025)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernels_equal_reference(
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    with_residual: bool,
    device: torch.device,
    random: torch.Generator,
) -> None:
    x = torch.randn(rows, hidden, generator=random).to(dtype)
    weight = torch.randn(hidden, generator=random).to(dtype)
    residual = torch.randn(rows, hidden, generator=random).to(dtype) if with_residual else None
    on_device = residual.to(device, copy=True) if residual is not None else None
    on_cpu = residual.clone() if residual is not None else None
    y = rms_norm_triton(x.to(device), weight.to(device), 1e-5, on_device).cpu()
    ours = rms_norm_cpu(x, weight, 1e-5, on_cpu)
    expected = rms_norm_reference(x, weight, 1e-5, residual)
    limits = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(y, expected, **limits)
    torch.testing.assert_close(ours, expected, **limits)
    if residual is not None and on_cpu is not None:
        assert torch.equal(on_cpu, residual)
    if residual is not None and on_device is not None:
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        ulp = 2**-7 if dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(on_device.cpu(), residual, rtol=ulp, atol=0.0)


def test_reference_equals_torch(random: torch.Generator) -> None:
    x, weight = torch.randn(4, 50, generator=random), torch.randn(50, generator=random)
    expected = torch.nn.functional.rms_norm(x, (50,), weight, 1e-5)
    torch.testing.assert_close(rms_norm_reference(x, weight, 1e-5), expected)


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    x, weight = torch.zeros(4, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(AssertionError, match="needs contiguous rows, x has strides"):
        rms_norm_triton(x[:, ::2], weight[:4], 1e-5)
    with pytest.raises(AssertionError, match=r"weight is \(4,\), rows have 8"):
        rms_norm_triton(x, weight[:4], 1e-5)
    with pytest.raises(AssertionError, match=r"weight is torch\.float64, x is torch\.float32"):
        rms_norm_triton(x, weight.double(), 1e-5)
    with pytest.raises(AssertionError, match=r"residual is \(2, 8\), x \(4, 8\)"):
        rms_norm_triton(x, weight, 1e-5, x[:2])
