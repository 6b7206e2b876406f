"""How long a stream runs, from how many ran and how many ended (Little's law).

Nobody says beforehand how long an answer will be, and a queue of streams is not so many standing
streams: each takes a place for its own time only.
"""

from __future__ import annotations

from dataclasses import replace

from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import Load, PoolWindow

MEMORY_S = 300.0
FEWEST = 5.0
"""Streams that ended; with fewer nothing is said."""


def served(state: ScalingState, load: Load, window_s: float) -> ScalingState:
    """The state with this window's streams in it."""
    inside = load.streams + load.queued_requests
    if state.inside < 0.0:
        return replace(state, inside=inside)
    ended = max(0.0, load.requests + state.inside - inside)
    kept = MEMORY_S / (MEMORY_S + max(window_s, 0.0))
    return replace(
        state,
        stream_seconds=kept * state.stream_seconds + load.streams * max(window_s, 0.0),
        streams_ended=kept * state.streams_ended + ended,
        inside=inside,
    )


def service_s(state: ScalingState) -> float:
    """Seconds of a stream; 0: not known."""
    if state.streams_ended < FEWEST:
        return 0.0
    return state.stream_seconds / state.streams_ended


def stream_work(state: ScalingState, load: Load, window: PoolWindow) -> float:
    """Stream-seconds of a window: what ran, or while streams wait, as then replicas say how many
    run, what the streams that came will take."""
    came = load.requests * service_s(state)
    return came if came > 0.0 and load.queued_requests > 0.0 else load.streams * window.window_s
