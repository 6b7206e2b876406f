"""A rollout's whole way, on a cluster where each step succeeds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tandem_operator.plan.rollout import Member, PoolState, PoolStep, Step, next_step


def all_steps(pools: Sequence[PoolState], limit: int = 10_000) -> list[Step]:
    """Every step until nothing is left to do.

    Raises RuntimeError when `limit` steps are not enough: the rollout would never end.
    """
    states = list(pools)
    steps: list[Step] = []
    for serial in range(limit):
        step = next_step(states)
        if step.idle and all(m.ready and not m.leaving for p in states for m in p.members):
            return steps
        steps.append(step)
        states = [
            _settled(state, pool_step, serial)
            for state, pool_step in zip(states, step.pools, strict=True)
        ]
    raise RuntimeError(f"no end after {limit} steps")


def _settled(pool: PoolState, step: PoolStep, serial: int) -> PoolState:
    """The pool after a step: what left is gone, what was made last time is Ready."""
    kept = [m for m in pool.members if not m.leaving and m.name not in step.leave]
    stayed = [m for m in pool.members if m.name in step.stay]
    members = [replace(m, ready=not m.broken and not m.starved, leaving=False) for m in kept]
    members += [replace(m, leaving=False) for m in stayed]
    members += [
        Member(f"{revision}-{serial}-{i}", revision, alone=pool.role == "both")
        for i, revision in enumerate(step.create)
    ]
    return replace(pool, members=tuple(members))
