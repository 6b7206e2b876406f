"""How many replicas the load of this moment takes, as a fraction, at full use.

Prompts: to have every prompt computed within its slack (the time to first token less its own
computation), the pool must do W(w) tokens in w + slack seconds, for each span w that ends now and
the W(w) tokens that arrived in it. The largest W(w) / (w + slack) is the rate that is needed: a
burst shorter than the slack asks for less than its peak, a long one for its mean.

Streams: those that run and those that wait, over what a replica holds at the target. A pool that
does both needs the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem_operator.plan.scaling.capacity import prompt_rate, streams_at
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.window import Load, StepCost, StepSums

MOST_WINDOWS = 24
LEAST_SLACK = 0.25
"""Of the target, for prompts that take most of it themselves."""
Arrivals = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Need:
    """What the load takes."""

    demand: float
    """Prompt tokens per second (prefill) or streams."""
    capacity: float
    """Of one replica, in the same unit; 0: not known."""
    replicas: float


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


def prompt_demand(arrivals: Arrivals, slack_s: float) -> float:
    """Prompt tokens per second with which every prompt that arrived is computed in time."""
    seconds, tokens, largest = slack_s, 0.0, 0.0
    for window_s, arrived_tokens in reversed(arrivals):
        seconds += window_s
        tokens += arrived_tokens
        largest = max(largest, tokens / seconds)
    return largest


def need_of(
    policy: Policy,
    cost: StepCost,
    sums: StepSums,
    arrivals: Arrivals,
    load: Load,
    startup_s: float,
) -> Need:
    """The need of a pool's load."""
    prompt, streams = Need(0.0, 0.0, 0.0), Need(0.0, 0.0, 0.0)
    if policy.role != "decode":
        prompt = _prompts(policy, prompt_rate(cost, sums, load), arrivals, load, startup_s)
    if policy.role != "prefill":
        demand = load.streams + (load.queued_requests if policy.role == "decode" else 0.0)
        capacity = streams_at(cost, sums, load, policy.tpot_ms / 1000.0)
        streams = Need(demand, capacity, demand / capacity if capacity else 0.0)
    # Streams account for the prompts between their tokens, but not for a burst of prompts.
    return max(prompt, streams, key=lambda need: need.replicas)


def _prompts(policy: Policy, rate: float, arrivals: Arrivals, load: Load, startup_s: float) -> Need:
    if rate <= 0.0:
        return Need(0.0, 0.0, 0.0)
    target_s = policy.ttft_ms / 1000.0
    tokens = sum(tokens for _, tokens in arrivals)
    own_s = (load.prompt_tokens / load.requests if load.requests else 0.0) / rate
    slack_s = max(target_s - own_s, LEAST_SLACK * target_s) if tokens else target_s
    # What waits has to be gone by the time that a new replica serves.
    demand = prompt_demand(arrivals, slack_s) + load.queued_tokens / (startup_s + slack_s)
    return Need(demand, rate, demand / rate)
