"""States as text for a status, and decisions as lines of a log that replay to the same decisions.

A line holds everything that `decide_fleet` was given, exactly; a status holds the state rounded to
what matters after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tandem_operator.plan.scaling.decision import Decision
from tandem_operator.plan.scaling.fleet import decide_fleet
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import Sample, ScalingState
from tandem_operator.plan.scaling.window import PoolWindow

DIGITS = 6
UNIX_S = 1e8
"""Larger numbers of a state are times."""
CHANGE = 0.10
LEAST = (1e-4, 1e-7, 1e-6, 0.5, 0.01, 0.1, 0.1)
"""Changes of cost, start-up time, trim and needs that are none."""
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


def adopted(state: ScalingState, now_s: float) -> ScalingState:
    """A state from a status, gone on with. A status is not written while nothing changes, so what
    it holds was true until now, however old it is."""
    late_s = max(0.0, now_s - state.held[-1].at_s) if state.held else 0.0
    busy = bool(state.past) and state.past[-1].need > 0.0
    return replace(
        state,
        held=tuple(Sample(s.at_s + late_s, s.need) for s in state.held),
        inside=-1.0,
        last_load_s=now_s if busy or state.last_load_s is None else state.last_load_s,
    )


def changed(before: ScalingState, now: ScalingState) -> bool:
    """Whether what a new operator would go on with differs by more than CHANGE."""
    return any(
        abs(new - old) > CHANGE * max(abs(old), abs(new)) and abs(new - old) > least
        for old, new, least in zip(_marks(before), _marks(now), LEAST, strict=True)
    )


def _marks(state: ScalingState) -> tuple[float, ...]:
    cost = state.cost
    costs = (cost.base_s, cost.prompt_s, cost.stream_s) if cost else (0.0, 0.0, 0.0)
    held = state.held[0].need if state.held else 0.0
    latest = state.past[-1].need if state.past else 0.0
    return (*costs, state.startup_s or 0.0, state.trim, held, latest)


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
    """Decide a line of the log again; None for a line that is about something else.

    A line of the operator's own output has the log's line under `decision`.
    """
    try:
        entry = msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return None
    if isinstance(entry, dict):
        entry = entry.get("decision", entry)
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
