"""What an engine is, and what its events leave to others."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem_runtime.roofline.replica import Replica


@dataclass(frozen=True)
class EngineSpec:
    """What all replicas of a pool have in common."""

    replica: Replica
    chunk_tokens: int
    max_running: int
    keeps_streams: bool
    """Whether the streams of its prompts run here, or go to another pool."""
    slowdown: float = 1.0
    """Factor on every step's time: an engine that is not what the arithmetic says."""
    capacity_tokens: int = field(init=False)
    slope_s: float = field(init=False)
    """What a token of context adds to a step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity_tokens", self.replica.kv_capacity_tokens)
        object.__setattr__(self, "slope_s", self.replica.decode_token_s() * self.slowdown)


@dataclass
class Piece:
    """A prompt's share of a step."""

    request: int
    tokens: int
    last: bool


@dataclass(slots=True)
class StepOutcome:
    """What a finished event leaves to others."""

    prompts_done: list[int] = field(default_factory=list)
    streams_done: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    expired: list[int] = field(default_factory=list)
