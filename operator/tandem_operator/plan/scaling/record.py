"""States as text for a status, and decisions as lines of a log that replay to the same decisions.

A line holds everything that `decide_fleet` was given, exactly; a status holds the state rounded to
what matters after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tandem_operator.plan.scaling.decision import Decision
from tandem_operator.plan.scaling.fleet import decide_fleet
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import PoolWindow

DIGITS = 6
UNIX_S = 1e8
"""Larger numbers of a state are times."""
LONGEST = 4096
"""Of a state's text."""


@dataclass(frozen=True)
class Look:
    """What the pools of a fleet were decided on."""

    now_s: float
    policies: Mapping[str, Policy]
    states: Mapping[str, ScalingState]
    windows: Mapping[str, PoolWindow]
    budget_gpus: int | None = None

    def decide(self) -> dict[str, Decision]:
        """The decisions, the same at any time."""
        return decide_fleet(self.policies, self.states, self.windows, self.budget_gpus, self.now_s)


def state_text(state: ScalingState) -> str:
    """The state for a status."""
    return msgspec.json.encode(_rounded(msgspec.to_builtins(state))).decode()


def state_of(text: str | None) -> ScalingState:
    """The state in a status; that of a new pool where there is none that is understood."""
    if not text or len(text) > LONGEST:
        return ScalingState()
    try:
        return msgspec.json.decode(text, type=ScalingState)
    except msgspec.MsgspecError:
        return ScalingState()


def line(fleet: str, look: Look, decisions: Mapping[str, Decision]) -> str:
    """One line of the decision log."""
    entry = {
        "scaling": fleet,
        "look": look,
        "decisions": {
            name: {"target": d.target, "reason": d.reason, "numbers": d.numbers}
            for name, d in decisions.items()
        },
    }
    return msgspec.json.encode(entry).decode()


@dataclass(frozen=True)
class Replayed:
    """A line of the log, decided again."""

    fleet: str
    logged: Mapping[str, tuple[int, str]]
    """Target and reason by pool."""
    decided: Mapping[str, tuple[int, str]]

    @property
    def same(self) -> bool:
        return self.logged == self.decided


def replay(text: str) -> Replayed | None:
    """Decide a line of the log again; None for a line that is about something else."""
    try:
        entry = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return None
    if not isinstance(entry, dict) or "scaling" not in entry:
        return None
    look = msgspec.convert(entry["look"], Look)
    logged = {n: (d["target"], d["reason"]) for n, d in entry["decisions"].items()}
    decided = {n: (d.target, str(d.reason)) for n, d in look.decide().items()}
    return Replayed(entry["scaling"], logged, decided)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 1) if value > UNIX_S else float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
