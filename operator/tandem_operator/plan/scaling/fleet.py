"""`decide_fleet`: the pools of a fleet, within one GPU budget where there is one.

Each pool decides for itself first. Where their wishes exceed the budget, replicas go one at a time
to the pool with the largest need per replica, from the pool that has the smallest even without it,
so that prefill and decode exchange replicas as the load shifts between them. A replica that leaves
holds its GPUs until it is gone: what it gives up can be used only then. A pool under its lower
bound comes before any need: a schedule may have raised it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf

from tandem_operator.plan.scaling.decision import Decision, ScaleReason
from tandem_operator.plan.scaling.feedback import short
from tandem_operator.plan.scaling.law import decide
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import PoolWindow

EXCHANGE_GAIN = 0.2
"""By how much the needs per replica must differ for one to move."""


def decide_fleet(
    policies: Mapping[str, Policy],
    states: Mapping[str, ScalingState],
    windows: Mapping[str, PoolWindow],
    budget_gpus: int | None,
    now_s: float,
) -> dict[str, Decision]:
    """A decision for every pool of `policies`, by name. A pool without a state is a new one."""
    known = {name: states.get(name, ScalingState()) for name in sorted(policies)}
    policies = {
        name: policies[name].scheduled(
            now_s, state.startup_s or policies[name].startup_s, windows[name].window_s
        )
        for name, state in known.items()
    }
    # A first token is late as well where it waits for a place in a decode pool.
    late = any(
        policies[name].role != "prefill" and short(state, windows[name])
        for name, state in known.items()
    )
    decisions = {
        name: decide(
            policies[name], state, windows[name], now_s,
            late_elsewhere=late and policies[name].role == "prefill",
        )
        for name, state in known.items()
    }  # fmt: skip
    if budget_gpus is None:
        return decisions
    targets = _shared(policies, windows, decisions, budget_gpus)
    return {
        name: _cut(decision, targets[name], windows[name], now_s)
        for name, decision in decisions.items()
    }


def _shared(
    policies: Mapping[str, Policy],
    windows: Mapping[str, PoolWindow],
    decisions: Mapping[str, Decision],
    budget_gpus: int,
) -> dict[str, int]:
    """Sizes within the budget: none is more than its pool decided."""
    gpus = {name: policy.gpus_per_replica for name, policy in policies.items()}
    floors = {n: min(policies[n].min_replicas, d.target) for n, d in decisions.items()}
    least = {
        n: max(floor, windows[n].size - policies[n].largest_in(windows[n].size))
        for n, floor in floors.items()
    }

    def pressure(name: str, replicas: int) -> float:
        """Forecast need for each replica that the pool would have."""
        return inf if replicas < floors[name] else _pressure(decisions[name], replicas)

    targets = {n: max(min(windows[n].size, d.target), least[n]) for n, d in decisions.items()}
    left = budget_gpus - sum(gpus[n] * target for n, target in targets.items())
    for _ in range(2 * sum(d.target for d in decisions.values()) + sum(targets.values())):
        hungry = [n for n, d in decisions.items() if targets[n] < d.target]
        giving = [n for n in targets if targets[n] > least[n]]
        taker = max(hungry, key=lambda n: (pressure(n, targets[n]), n), default=None)
        giver = min(giving, key=lambda n: (pressure(n, targets[n] - 1), n), default=None)
        if taker is not None and gpus[taker] <= left:
            targets[taker] += 1
            left -= gpus[taker]
        elif giver is not None and (left < 0 or _better(pressure, targets, taker, giver)):
            targets[giver] -= 1
            left += gpus[giver]
        else:
            break
    # What a pool with larger replicas could not use.
    for name in sorted(targets, key=lambda n: -pressure(n, targets[n])):
        more = min(decisions[name].target - targets[name], max(left, 0) // gpus[name])
        targets[name] += more
        left -= more * gpus[name]
    return _when_free(policies, windows, targets, budget_gpus)


def _better(
    pressure: Callable[[str, int], float],
    targets: Mapping[str, int],
    taker: str | None,
    giver: str,
) -> bool:
    """Whether a replica is worth moving: by enough, or two pools would exchange one for ever."""
    if taker is None or taker == giver:
        return False
    given = pressure(giver, targets[giver] - 1)
    return pressure(taker, targets[taker]) > (1.0 + EXCHANGE_GAIN) * given


def _when_free(
    policies: Mapping[str, Policy],
    windows: Mapping[str, PoolWindow],
    targets: dict[str, int],
    budget_gpus: int,
) -> dict[str, int]:
    """Growth waits for the GPUs that replicas on their way out still hold."""
    free = budget_gpus
    for name, window in windows.items():
        # What is decided to leave now still runs, and so do those that drain already.
        free -= policies[name].gpus_per_replica * (window.size + window.draining)
    granted = {}
    for name, target in sorted(targets.items()):
        cost, size = policies[name].gpus_per_replica, windows[name].size
        more = min(max(target - size, 0), max(free, 0) // cost)
        free -= more * cost
        granted[name] = size + more if target > size else target
    return granted


def _pressure(decision: Decision, replicas: int) -> float:
    wanted = max(decision.numbers.likely, decision.numbers.held)
    # A pool whose need is not known asks for what it has.
    return (wanted or float(decision.target)) / max(replicas, 0.5)


def _cut(decision: Decision, target: int, window: PoolWindow, now_s: float) -> Decision:
    if target == decision.target:
        return decision
    state = decision.state
    if target < window.size:
        state = replace(state, last_in_s=now_s)
    return Decision(
        target, ScaleReason.BUDGET, replace(decision.numbers, limited_by="budget"), state
    )
