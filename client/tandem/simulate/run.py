"""What goes into a run, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tandem.simulate.pool import PoolSpec
from tandem.simulate.requests import Requests

PREFILL: Final = "prefill"
DECODE: Final = "decode"


class SimulationError(ValueError):
    """The run cannot be made or does not end; the message is a sentence."""


@dataclass(frozen=True)
class Setup:
    """Everything about a run but its trace and its policy."""

    pools: tuple[PoolSpec, ...]
    """Decode, and prefill where the fleet has it."""
    ttft_s: float
    tpot_s: float
    ttft_quantile: float = 0.95
    tpot_quantile: float = 0.95
    expiry_s: float = 30.0
    """A request without a first token by then is given up."""
    look_every_s: float = 10.0
    handoff_bytes_per_s: float = 50e9
    failures_s: float | None = None
    """Mean time between failures of a replica; None: none fails."""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """The fleet at one look."""

    at_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    sizes: tuple[int, ...]
    ready: tuple[int, ...]
    reasons: tuple[str, ...]
    replica_s: tuple[float, ...]
    """Replica-seconds of each pool since the run's beginning."""
    ttft_s: float | None
    tpot_s: float | None


@dataclass
class Run:
    """What came out."""

    setup: Setup
    requests: Requests
    samples: list[Sample] = field(default_factory=list)
    ended_s: float = 0.0
    replica_s: tuple[float, ...] = ()
    scale_events: tuple[int, ...] = ()
    busy_s: tuple[float, ...] = ()
    failures: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
