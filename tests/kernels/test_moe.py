"""Routing and the experts' linear layers, at any distribution of tokens over experts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tandem_runtime.kernels.moe import (
    grouped_linear_reference,
    grouped_linear_triton,
    route_reference,
    route_triton,
)
from torch.nn import functional

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "count", "k"), [(1, 8, 2), (7, 5, 3), (4, 1, 1), (3, 64, 8)])
def test_routing_equals_its_reference(
    rows: int,
    count: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    logits = torch.randn(rows, count, generator=random).to(dtype)
    weights, experts = route_triton(logits.to(device), k)
    expected, picked = route_reference(logits, k)
    assert torch.equal(experts.cpu(), picked)
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(expected.sum(-1), torch.ones(rows))


def test_the_lower_expert_wins_among_equals(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    for run in (route_reference, route_triton):
        weights, experts = run(logits if run is route_reference else logits.to(device), 2)
        assert experts.tolist() == [[1, 2], [0, 1]]
        assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_a_row_that_is_not_finite_goes_somewhere_and_stays_alone(device: torch.device) -> None:
    logits = torch.zeros(3, 5, device=device)
    logits[1] = float("nan")
    weights, experts = route_triton(logits, 2)
    assert (experts >= 0).all()
    assert (experts < 5).all()
    assert weights[1].isnan().all()
    assert weights[[0, 2]].tolist() == [[0.5, 0.5]] * 2


def experts_of(pairs: int, k: int, count: int, random: torch.Generator) -> torch.Tensor:
    return torch.stack([torch.randperm(count, generator=random)[:k] for _ in range(pairs // k)])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "count", "k", "columns", "inner"),
    [(1, 4, 2, 24, 40), (7, 5, 3, 130, 33), (90, 3, 2, 17, 65), (5, 9, 1, 128, 64)],
)
def test_the_linear_layers_equal_their_reference(
    rows: int,
    count: int,
    k: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    device: torch.device,
    random: torch.Generator,
) -> None:
    experts = experts_of(rows * k, k, count, random)
    w = (torch.randn(count, columns, inner, generator=random) / inner**0.5).to(dtype)
    linears = [partial(functional.linear, weight=w[e]) for e in range(count)]
    for share in (k, 1):
        x = torch.randn(rows * k // share, inner, generator=random).to(dtype)
        y = grouped_linear_triton(x.to(device), w.to(device), experts.to(device), share)
        expected = grouped_linear_reference(x, linears, experts, share)
        each = [
            functional.linear(x[i // share], w[e]) for i, e in enumerate(experts.flatten().tolist())
        ]
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(expected, torch.stack(each), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(y.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_may_go_to_one_expert(
    expert: int, device: torch.device, random: torch.Generator
) -> None:
    x = torch.randn(150, 16, generator=random).to(device)
    w = torch.randn(5, 8, 16, generator=random).to(device)
    experts = torch.full((150, 1), expert, device=device)
    y = grouped_linear_triton(x, w, experts, 1)
    torch.testing.assert_close(y, x @ w[expert].T, rtol=1e-5, atol=1e-5)


def test_wrong_input_is_a_sentence(device: torch.device) -> None:
    x, w = torch.zeros(4, 8, device=device), torch.zeros(3, 6, 8, device=device)
    experts = torch.zeros(4, 2, dtype=torch.int64, device=device)
    with pytest.raises(AssertionError, match="4 of 3 experts cannot be picked"):
        route_triton(torch.zeros(2, 3, device=device), 4)
    with pytest.raises(AssertionError, match="logits have strides"):
        route_triton(torch.zeros(3, 2, device=device).T, 1)
    with pytest.raises(AssertionError, match=r"x is \(4, 8\), \(8, 8\) needed"):
        grouped_linear_triton(x, w, experts, 1)
    with pytest.raises(AssertionError, match=r"experts are torch\.int32, int64 needed"):
        grouped_linear_triton(x, w, experts.int(), 2)
    with pytest.raises(AssertionError, match=r"w is torch\.float64, x is torch\.float32"):
        grouped_linear_triton(x, w.double(), experts, 2)
    with pytest.raises(AssertionError, match="w has strides"):
        grouped_linear_triton(x, w.transpose(1, 2).contiguous().transpose(1, 2), experts, 2)
