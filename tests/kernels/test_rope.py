"""Rotary embedding in place, on a view into wider rows."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.kernels.rope import rope_cpu, rope_reference, rope_triton

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 12, 64), (5, 3, 80), (7, 1, 2), (3, 5, 34)])
def test_kernels_equal_reference(
    rows: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    wide = torch.randn(rows, heads + 2, dim, generator=random).to(dtype)
    angles = torch.rand(rows, dim // 2, generator=random) * 100
    cos, sin = tables(angles)
    on_device = wide.to(device, copy=True)
    rope_triton(on_device[:, :heads], cos.to(device), sin.to(device))
    on_cpu = wide.clone()
    rope_cpu(on_cpu[:, :heads], cos, sin)
    rope_reference(wide[:, :heads], cos, sin)
    torch.testing.assert_close(on_cpu, wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(on_cpu[:, heads:], wide[:, heads:]), "rows beyond the view changed"
    torch.testing.assert_close(on_device.cpu(), wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(on_device.cpu()[:, heads:], wide[:, heads:]), "rows beyond the view changed"


def test_reference_is_a_rotation_of_pairs() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    angle = torch.tensor([[0.5, 1.5]])
    rope_reference(x, *tables(angle))
    pairs = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    turned = pairs * torch.polar(torch.ones(2), angle[0])
    torch.testing.assert_close(x[0, 0], torch.cat((turned.real, turned.imag)))


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    x, table = torch.zeros(4, 2, 8, device=device), torch.zeros(4, 8, device=device)
    with pytest.raises(AssertionError, match="must be adjacent, x has strides"):
        rope_triton(x.transpose(1, 2), table, table)
    with pytest.raises(AssertionError, match=r"sin is \(3, 8\), \(4, 8\) needed"):
        rope_triton(x, table, table[:3])
    with pytest.raises(AssertionError, match=r"cos is torch\.float64, float32 needed"):
        rope_triton(x, table.double(), table)
