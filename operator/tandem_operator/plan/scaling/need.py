"""How many replicas the load of this moment takes, as a fraction, at full use.

Prompts: to have every prompt computed within its slack (the time to first token less its own
computation), the pool must do W(w) tokens in w + slack seconds, for each span w that ends now and
the W(w) tokens that arrived in it. The largest W(w) / (w + slack) is the rate that is needed: a
burst shorter than the slack asks for less than its peak, a long one for its mean.

Streams: those that run, on average over the last few looks, over what a replica holds at the
target; while some wait, what the streams that arrive will take, by the same rule as prompts, and a
share of those that wait: each needs a place for its own time only. A pool that does both needs the
larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

from tandem_operator.plan.scaling.capacity import prompt_rate, step_s, streams_at
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import Load, StepCost

MOST_WINDOWS = 24
LEAST_SLACK = 0.25
"""Of the target, for prompts that take most of it themselves."""
WAITS = 0.01
"""Of prompts, may wait for longer than their slack."""
SPREAD = 2.33
"""Standard deviations that WAITS is away from the mean."""
UNEVEN = 2.0
"""The work beside which a prompt waits is that of long ones, over the mean prompt's."""
STEADY_S = 15.0
"""Over which running streams are averaged: their number at one moment is chance."""
Arrivals = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Need:
    """What the load takes."""

    demand: float
    """Prompt tokens per second (prefill) or streams."""
    capacity: float
    """Of one replica, in the same unit; 0: not known."""
    replicas: float
    asked: float
    """Likewise, without what waits."""


def arrived(arrivals: Arrivals, window_s: float, tokens: float, longest_s: float) -> Arrivals:
    """The recent windows with one more; those before `longest_s` are forgotten."""
    if window_s <= 0.0:
        return arrivals
    windows = [*arrivals, (window_s, tokens)]
    while len(windows) > 1 and sum(s for s, _ in windows[1:]) >= longest_s:
        windows.pop(0)
    while len(windows) > MOST_WINDOWS:
        (first_s, first), (second_s, second), *rest = windows
        windows = [(first_s + second_s, first + second), *rest]
    return tuple(windows)


def most_work(arrivals: Arrivals, slack_s: float) -> float:
    """The rate with which all work that arrived is done in time."""
    seconds, tokens, largest = slack_s, 0.0, 0.0
    for window_s, arrived_tokens in reversed(arrivals):
        seconds += window_s
        tokens += arrived_tokens
        largest = max(largest, tokens / seconds)
    return largest


def lately(arrivals: Arrivals) -> float:
    """The rate at which work arrived in the last few looks."""
    seconds = work = 0.0
    for window_s, arrived_work in reversed(arrivals):
        seconds, work = seconds + window_s, work + arrived_work
        if seconds >= STEADY_S:
            break
    return work / seconds if seconds > 0.0 else 0.0


def need_of(
    policy: Policy,
    cost: StepCost,
    state: ScalingState,
    load: Load,
    startup_s: float,
    stream_s: float,
) -> Need:
    """The need of a pool's load.

    Args:
        policy: its role and targets.
        cost: of a step.
        state: with this load's work in it.
        load: of the last window.
        startup_s: of a replica.
        stream_s: of a stream; 0: not known.
    """
    needs = []
    if policy.role != "decode":
        rate = prompt_rate(cost, state.steps, load)
        needs.append(_prompts(policy, rate, state.arrivals, load, startup_s))
    if policy.role != "prefill":
        needs.append(_streams(policy, cost, state, load, startup_s, stream_s))
    # Streams account for the prompts between their tokens, but not for a burst of prompts.
    return max(needs, key=lambda need: (need.replicas, need.capacity))


def _prompts(policy: Policy, rate: float, arrivals: Arrivals, load: Load, startup_s: float) -> Need:
    if rate <= 0.0:
        return Need(0.0, 0.0, 0.0, 0.0)
    target_s = policy.ttft_ms / 1000.0
    tokens = sum(tokens for _, tokens in arrivals)
    own_s = (load.prompt_tokens / load.requests if load.requests else 0.0) / rate
    slack_s = max(target_s - own_s, LEAST_SLACK * target_s) if tokens else target_s
    asked = most_work(arrivals, slack_s)
    asked += rate * _spare(asked / rate, own_s, slack_s)
    # What waits has to be gone by the time that a new replica serves.
    demand = asked + load.queued_tokens / (startup_s + slack_s)
    return Need(demand, rate, demand / rate, asked / rate)


def _spare(busy: float, own_s: float, slack_s: float) -> float:
    """Replicas beside the busy ones, so that few prompts wait for longer than their slack.

    A prompt takes one replica for its own time, however many there are. In M/M/c the wait exceeds t
    with a chance of P(wait) x exp(-(c - busy) t / service): WAITS of one either way, by so many
    that hardly any waits (square-root staffing), or by waits that are short. Where one replica does
    the work there is none: for chance alone the pool would cost twice as much.
    """
    by_count = SPREAD * sqrt(max(busy - 1.0, 0.0))
    by_wait = -log(WAITS) * UNEVEN * own_s / slack_s
    return min(by_count, by_wait)


def _streams(
    policy: Policy,
    cost: StepCost,
    state: ScalingState,
    load: Load,
    startup_s: float,
    stream_s: float,
) -> Need:
    tpot_s = policy.tpot_ms / 1000.0
    capacity = streams_at(cost, state.steps, load, tpot_s)
    if capacity <= 0.0:
        return Need(0.0, 0.0, 0.0, 0.0)
    asked, waiting = load.streams, 0.0
    if policy.role == "decode":
        waiting = load.queued_requests
    if policy.role == "decode" and stream_s > 0.0:
        # A stream may take as long as all its tokens at the target.
        late_s = stream_s * max(1.0, tpot_s / step_s(cost, capacity))
        asked = max(most_work(state.arrivals, late_s), lately(state.arrivals))
        # One that waits takes a place for its own time only, once, until a new replica serves.
        waiting *= stream_s / (startup_s + stream_s)
    # They come by chance: the fewer they are, the more their number varies around its mean.
    asked += sqrt(asked)
    demand = asked + waiting
    return Need(demand, capacity, demand / capacity, asked / capacity)
