"""Who decides the sizes of pools: the operator's own law, or nobody. Others plug in beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tandem_operator.plan.scaling.fleet import decide_fleet
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import PoolWindow


@dataclass(frozen=True)
class Choice:
    """A size, and why."""

    target: int
    reason: str


class Scaler(Protocol):
    """A policy for all pools of a fleet. It sees windows and the time, and keeps its own state."""

    def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
        """Sizes by pool; a pool that is left out stays as it is."""
        ...


class Fixed:
    """Sizes stay what they are."""

    def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
        return {}


@dataclass
class OperatorLaw:
    """What the operator would decide, by its own code."""

    policies: Mapping[str, Policy]
    budget_gpus: int | None = None
    states: dict[str, ScalingState] = field(default_factory=dict)

    def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
        scaled = {name: windows[name] for name in self.policies}
        decisions = decide_fleet(self.policies, self.states, scaled, self.budget_gpus, now_s)
        self.states = {name: decision.state for name, decision in decisions.items()}
        return {
            name: Choice(decision.target, str(decision.reason))
            for name, decision in decisions.items()
        }
