"""RMSNorm of each head, in a view into wider rows."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.head_norm import head_norm_cpu, head_norm_reference, head_norm_triton

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 8), (5, 9, 64), (3, 4, 80), (2, 40, 1)])
def test_kernels_equal_reference(
    rows: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    wide = torch.randn(rows, heads + 3, dim, generator=random).to(dtype)
    weight = torch.randn(heads, dim, generator=random).to(dtype)
    on_device, on_cpu = wide.to(device, copy=True), wide.clone()
    head_norm_triton(on_device[:, :heads], weight.to(device), 1e-5)
    head_norm_cpu(on_cpu[:, :heads], weight, 1e-5)
    head_norm_reference(wide[:, :heads], weight, 1e-5)
    for ours in (on_device.cpu(), on_cpu):
        torch.testing.assert_close(ours, wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_reference_equals_torch(random: torch.Generator) -> None:
    x, weight = torch.randn(4, 2, 50, generator=random), torch.randn(2, 50, generator=random)
    each = [torch.nn.functional.rms_norm(x[:, h], (50,), weight[h], 1e-5) for h in range(2)]
    head_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(x, torch.stack(each, dim=1))


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    x, weight = torch.zeros(4, 3, 8, device=device), torch.ones(3, 8, device=device)
    with pytest.raises(AssertionError, match="a head's elements must be adjacent, x has strides"):
        head_norm_triton(x.transpose(1, 2), weight, 1e-5)
    with pytest.raises(AssertionError, match=r"weight is \(2, 8\), \(3, 8\) needed"):
        head_norm_triton(x, weight[:2], 1e-5)
    with pytest.raises(AssertionError, match=r"weight is torch\.float64, x is torch\.float32"):
        head_norm_triton(x, weight.double(), 1e-5)
