"""A pool of ideal replicas with stated step times, to close the loop around the law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tandem_operator.plan.scaling.decision import Decision
from tandem_operator.plan.scaling.law import decide
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import NO_STEPS, Load, PoolWindow, Role, step

TICK_S = 10.0


@dataclass
class Plant:
    """Replicas that take 8 ms + 0.02 ms a prompt token + 0.25 ms a stream for a step: 8192-token
    chunks at 47,700 tokens/s, and 68 streams at 25 ms."""

    policy: Policy
    startup_s: float = 100.0
    ready: int = 1
    state: ScalingState = field(default_factory=ScalingState)
    now_s: float = 1_000_000.0
    starting: list[float] = field(default_factory=list)
    """When each of them will serve."""
    backlog: float = 0.0
    decisions: list[Decision] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.ready + len(self.starting)

    def tick(self, prompt_tokens_s: float = 0.0, streams: float = 0.0) -> Decision:
        """One look and what follows from it."""
        self.now_s += TICK_S
        new = [at for at in self.starting if at <= self.now_s]
        self.starting = [at for at in self.starting if at > self.now_s]
        self.ready += len(new)
        ages = tuple(self.now_s - at + self.startup_s for at in self.starting)
        window = PoolWindow(
            TICK_S,
            self.size,
            self.ready,
            starting_s=ages,
            startup_s=(self.startup_s,) * len(new),
            load=self._load(prompt_tokens_s, streams),
        )
        decision = decide(self.policy, self.state, window, self.now_s)
        self.state = decision.state
        self.decisions.append(decision)
        self._resize(decision.target)
        return decision

    def _resize(self, target: int) -> None:
        while self.size > target:
            if self.starting:
                self.starting.pop()
            else:
                self.ready -= 1
        while self.size < target:
            self.starting.append(self.now_s + self.startup_s)

    def _load(self, prompt_tokens_s: float, streams: float) -> Load:
        tokens, rate = TICK_S * prompt_tokens_s, 47_700.0 * self.ready
        self.backlog = max(0.0, self.backlog + tokens - TICK_S * rate)
        wait_s = self.backlog / rate if rate else 0.0
        batch = streams / max(self.ready, 1)
        steps = NO_STEPS
        for varied in (0.5, 1.0, 1.5):
            s = int(varied * batch)
            # A prefill pool fills its steps; a step of streams takes the prompts of its own time.
            mixed = min(0.9, 0.00002 * prompt_tokens_s / max(self.ready, 1))
            seconds = (0.008 + 0.00025 * s) / (1.0 - mixed)
            p = int(mixed * seconds / 0.00002) if s else int(varied * min(prompt_tokens_s, 8192))
            if p or s:
                seconds = 0.008 + 0.00002 * p + 0.00025 * s
                steps += step(p, s, seconds).scaled(100.0 * self.ready)
        return Load(
            requests=tokens / 1000.0 + streams / 10.0,
            prompt_tokens=tokens,
            output_tokens=streams * 50.0,
            streams=streams,
            queued_requests=self.backlog / 1000.0,
            queued_tokens=self.backlog,
            ttft_ms=1000.0 * (0.05 + wait_s) if tokens else None,
            tpot_ms=8.0 + 0.25 * batch if streams else None,
            steps=steps,
            step_tokens=8192.0,
        )


@pytest.fixture
def plant() -> Callable[..., Plant]:
    def make(
        role: Role = "prefill", startup_s: float = 100.0, ready: int = 1, **policy: Any
    ) -> Plant:
        base = Policy(role, 1, 64, ttft_ms=500.0, tpot_ms=25.0)
        return Plant(replace(base, **policy), startup_s, ready)

    return make
