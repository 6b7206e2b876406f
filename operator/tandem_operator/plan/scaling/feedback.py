"""Feedback: a target that is missed although the load should fit corrects the learned capacity.

Only what capacity can explain is corrected: the same replicas must have served for a whole window
of the percentile, the load of the last start-up time must have fitted them, and they must have been
half full at least; a percentile is credited with the share of replicas that do not serve yet, or
each pod that starts would be asked for twice. The trim has a floor, so that a latency that no
replica helps (one very long prompt, a slow client network) cannot fill a cluster.
"""

from __future__ import annotations

from dataclasses import replace

from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import Load, PoolWindow

LEAST_TRIM = 0.5
LEAST_LOAD = 0.5
"""Of what the replicas can take: what is late under less of it is not for want of replicas."""
LARGEST_CUT = 0.8
"""Of the trim, at one look."""
SMALLEST_CUT = 0.95
GIVEN_BACK = 1.01
"""At one look at a percentile well under its target."""


def trimmed(
    policy: Policy,
    state: ScalingState,
    window: PoolWindow,
    load: Load,
    need: float,
    now_s: float,
    *,
    late_elsewhere: bool = False,
) -> ScalingState:
    """The state with the trim that this look asks for. `need` is in replicas, untrimmed;
    `late_elsewhere`: another pool is short, which explains a late first token."""
    ratio = _ratio(policy, load)
    settled = (
        state.ready_since_s is not None
        and now_s - state.ready_since_s >= policy.window_s
        and (state.trimmed_s is None or not 0.0 <= now_s - state.trimmed_s < policy.window_s)
    )
    explained = late_elsewhere or short(state, window)
    if ratio is None or window.ready == 0 or not settled or (explained and ratio > 1.0):
        return state
    credited = ratio * window.ready / (window.ready + len(window.starting_s))
    trim = state.trim
    if credited > 1.0 + policy.tolerance_percent / 100.0:
        # At this load per replica the target is missed: what it can take is less than that.
        cut = min(max(1.0 / credited, LARGEST_CUT), SMALLEST_CUT)
        missed = cut * need / window.ready
        if missed >= LEAST_LOAD:
            trim = max(LARGEST_CUT * trim, min(trim, missed), LEAST_TRIM)
    elif ratio < policy.low_percent / 100.0:
        trim = min(1.0, GIVEN_BACK * trim)
    return replace(state, trim=trim, trimmed_s=now_s)


def short(state: ScalingState, window: PoolWindow) -> bool:
    """Whether the load of the last start-up time did not fit: that explains what is late, and what
    it left waiting."""
    largest = max((sample.need for sample in state.past), default=0.0)
    return largest > window.ready * state.trim


def _ratio(policy: Policy, load: Load) -> float | None:
    """The worse of the percentiles that the pool answers for, over its target."""
    ratios = []
    if policy.role != "decode" and load.ttft_ms is not None:
        ratios.append(load.ttft_ms / policy.ttft_ms)
    if policy.role != "prefill" and load.tpot_ms is not None:
        ratios.append(load.tpot_ms / policy.tpot_ms)
    return max(ratios, default=None)
