"""The fleets of the benchmark and what counts as a kept request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from tandem.simulate.engine_spec import EngineSpec
from tandem.simulate.pool import PoolSpec
from tandem.simulate.run import Setup
from tandem.simulate.scalers import Scaler
from tandem.traces.trace import Trace
from tandem_runtime.roofline.gpus import find_gpu
from tandem_runtime.roofline.known import find_model
from tandem_runtime.roofline.model import ServedModel
from tandem_runtime.roofline.replica import Replica

from benchmarks.autoscaling.compiled.state import FINISHED
from benchmarks.autoscaling.fast import FastRun, simulate

SKIP_S: Final = 300.0
EXPIRY_S: Final = 30.0
LEAST_TTFT_S: Final = 1.0
TTFT_FACTOR: Final = 3.0
"""Over the prompt alone on an idle replica."""
LEAST_OUTPUT_TOKENS: Final = 16
"""Shorter answers have no time per output token that anyone notices."""
_GRID_TOKENS: Final = 128


@dataclass(frozen=True)
class FleetKind:
    """A model on its GPUs."""

    name: str
    replica: Replica
    tpot_s: float
    slowdown: float = 1.0


FLEETS: Final = {
    "8b": FleetKind(
        "8b", Replica(ServedModel(find_model("llama-3.1-8b")), find_gpu("H100"), 1), 0.025
    ),
    "70b": FleetKind(
        "70b", Replica(ServedModel(find_model("llama-3.1-70b")), find_gpu("H100"), 4), 0.040
    ),
}


@dataclass(frozen=True)
class Score:
    """What a policy did on a trace."""

    attained: float
    gpu_hours: float
    scale_events_per_h: float
    """Of the pool with the most."""

    def loss(self, least_gpu_hours: float) -> float:
        """GPU-hours over the clairvoyant plan's, and 0.1 for each point under 99 % attained."""
        return self.gpu_hours / least_gpu_hours + 10.0 * max(0.99 - self.attained, 0.0)


def make_setup(
    kind: FleetKind, sizes: Mapping[str, int], startup_s: float, look_every_s: float = 10.0
) -> Setup:
    """A prefill and a decode pool that begin with `sizes`, ready at once."""
    pools = tuple(
        PoolSpec(
            name=name,
            role="prefill" if name == "prefill" else "decode",
            engine=EngineSpec(kind.replica, 2048, 64, name != "prefill", kind.slowdown),
            replicas=sizes[name],
            startup_s=startup_s,
            expiry_s=EXPIRY_S,
        )
        for name in ("prefill", "decode")
    )
    return Setup(
        pools=pools,
        ttft_s=LEAST_TTFT_S,
        tpot_s=kind.tpot_s,
        expiry_s=EXPIRY_S,
        look_every_s=look_every_s,
    )


def play(setup: Setup, trace: Trace, scaler: Scaler) -> FastRun:
    """One run."""
    return simulate(setup, trace, scaler)


def score(run: FastRun, kind: FleetKind) -> Score:
    """Of all requests after the first SKIP_S, those within both targets; GPU-hours after it."""
    trace = run.trace
    arrival_s, outputs = np.asarray(trace.arrival_s), np.asarray(trace.output_tokens)
    uncached = np.asarray(trace.prompt_tokens) - run.cached
    kept = (run.fate == FINISHED) & (run.first_token_s <= _targets_s(kind, uncached))
    more = np.maximum(outputs - 1, 1)
    token_s = (run.finished_s - arrival_s - run.first_token_s) / more
    kept &= (outputs < LEAST_OUTPUT_TOKENS) | (token_s <= kind.tpot_s)
    counted = arrival_s >= SKIP_S
    skipped = run.replica_s[min(np.searchsorted(run.at_s, SKIP_S), len(run.at_s) - 1)]
    replica_s = float((run.replica_s[-1] - skipped).sum())
    return Score(
        attained=float(kept[counted].mean()) if counted.any() else 1.0,
        gpu_hours=replica_s * kind.replica.gpus / 3600,
        scale_events_per_h=max(run.scale_events) / (run.ended_s / 3600),
    )


def _targets_s(kind: FleetKind, uncached: Any) -> Any:
    """ttft_target_s of many prompts."""
    grid, places = np.unique(-(-uncached // _GRID_TOKENS), return_inverse=True)
    return np.array([ttft_target_s(kind, int(n) * _GRID_TOKENS) for n in grid])[places]


def ttft_target_s(kind: FleetKind, uncached_tokens: int) -> float:
    """max(1 s, 3 x the prompt alone)."""
    rounded = -(-uncached_tokens // _GRID_TOKENS) * _GRID_TOKENS
    return max(LEAST_TTFT_S, TTFT_FACTOR * prompt_s(kind.replica, rounded))


@lru_cache(maxsize=4096)
def prompt_s(replica: Replica, tokens: int) -> float:
    """A prompt alone."""
    return replica.prompt_s(tokens, 0, 2048)
