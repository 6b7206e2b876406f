"""A layer of experts on the CPU: each row is its own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tandem_runtime.model.decoder import Experts
from tandem_runtime.model.linear import Linear

HIDDEN, INNER, COUNT = 96, 160, 5


def layer(dtype: torch.dtype) -> Experts:
    random = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> Linear:
        weight = torch.randn(rows, columns, generator=random) / columns**0.5
        return Linear(weight.to(dtype))

    return Experts(
        router=linear(COUNT, HIDDEN),
        gate_up=[linear(2 * INNER, HIDDEN) for _ in range(COUNT)],
        down=[linear(HIDDEN, INNER) for _ in range(COUNT)],
        per_token=2,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    experts = layer(dtype)
    x = torch.randn(128, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = experts(x)
    for rows in (1, 2, 5, 7, 16, 33, 64):
        for start in range(0, len(x) - rows + 1, rows):
            part = slice(start, start + rows)
            assert torch.equal(experts(x[part]), whole[part]), f"{rows} rows from {start}"
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(experts(x[shuffled]), whole[shuffled])


def test_an_infinite_row_stays_alone() -> None:
    experts = layer(torch.float32)
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1))
    healthy = experts(x)
    x[3] = float("nan")
    others = [row for row in range(8) if row != 3]
    y = experts(x)
    assert torch.equal(y[others], healthy[others])
    assert y[3].isnan().all()
