"""What each kind of work costs, from sums over what was done and how long it took."""

from __future__ import annotations

from collections.abc import Sequence


def costs_of(
    matrix: Sequence[Sequence[float]],
    right: Sequence[float],
    known: Sequence[float],
    ridge: float,
) -> list[float] | None:
    """Least squares by the normal equations, no cost below zero; None where nothing can be said.

    `matrix` [n, n] and `right` [n] are the sums of work x work and of work x seconds. `ridge`, of
    each diagonal element, draws costs that the sums do not tell apart to those `known` [n]. A term
    whose cost comes out below zero is noise and costs nothing: the others carry its share.
    """
    terms = [i for i in range(len(right)) if matrix[i][i] > 0.0]
    while terms:
        found = _solve(
            [[matrix[i][j] for j in terms] for i in terms],
            [right[i] for i in terms],
            [known[i] for i in terms],
            ridge,
        )
        if found is not None and min(found) >= 0.0:
            costs = [0.0] * len(right)
            for i, cost in zip(terms, found, strict=True):
                costs[i] = cost
            return costs
        worst = 0 if found is None else min(range(len(terms)), key=lambda k: found[k])
        terms.pop(worst)
    return None


def _solve(
    matrix: list[list[float]], right: list[float], known: list[float], ridge: float
) -> list[float] | None:
    """Gaussian elimination; None of a matrix that is not positive."""
    n = len(right)
    # Scaled to a diagonal of ones, so that `ridge` has one meaning.
    scale = [matrix[i][i] ** -0.5 for i in range(n)]
    rows = [
        [matrix[i][j] * scale[i] * scale[j] for j in range(n)] + [right[i] * scale[i]]
        for i in range(n)
    ]
    for i in range(n):
        rows[i][i] += ridge
        rows[i][n] += ridge * known[i] / scale[i]
    for i in range(n):
        if rows[i][i] <= 0.0:
            return None
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [x - factor * y for x, y in zip(rows[k], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        rest = sum(rows[i][j] * found[j] for j in range(i + 1, n))
        found[i] = (rows[i][n] - rest) / rows[i][i]
    return [value * factor for value, factor in zip(found, scale, strict=True)]
