"""Who decides the sizes of pools: the operator's own law, or nobody. Others plug in beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class LawGroup:
    """Pools that share a budget, each with its policy."""

    policies: Mapping[str, Policy]
    budget_gpus: int | None = None
    shadow: bool = False
    """Decides, and leaves every size as it is."""


@dataclass
class OperatorLaw:
    """What the operator would decide, by its own code."""

    groups: Sequence[LawGroup]
    states: dict[str, ScalingState] = field(default_factory=dict)
    begins_s: float = 0.0
    """When the run begins, in Unix seconds: schedules go by the calendar."""

    def decide(self, windows: Mapping[str, PoolWindow], now_s: float) -> Mapping[str, Choice]:
        choices: dict[str, Choice] = {}
        now_s += self.begins_s
        for group in self.groups:
            seen = {name: windows[name] for name in group.policies}
            decided = decide_fleet(group.policies, self.states, seen, group.budget_gpus, now_s)
            for name, decision in decided.items():
                self.states[name] = decision.state
                target = windows[name].size if group.shadow else decision.target
                choices[name] = Choice(target, str(decision.reason))
        return choices
