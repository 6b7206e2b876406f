"""Events in order of time."""

from __future__ import annotations

import math

from benchmarks.autoscaling.compiled.prompts import arrive, prompts_end
from benchmarks.autoscaling.compiled.state import (
    ARRIVED,
    CREATED,
    FOLLOWING,
    HANDOFFS,
    LOGGED,
    NEXT,
    NONE,
    PHASE,
    READY,
    SLOTS,
    STARTED,
    STARTED_S,
    STARTING,
    STILL_OPEN,
    State,
    compiled,
)
from benchmarks.autoscaling.compiled.streams import admit, append_stream, epoch_ends


@compiled
def advance(s: State, until_s: float, end_s: float, now_s: float) -> float:
    """All events until then, or until every request has ended; the time of the last one."""
    ints, count = s.ints, s.when.shape[0]
    while ints[STILL_OPEN] > 0 or now_s < end_s:
        at_s, slot = math.inf, NONE
        for r in range(2 * SLOTS):
            if s.event_s[r] < at_s:
                at_s, slot = s.event_s[r], r
        handed, handoffs = NONE, s.pools[HANDOFFS, LOGGED]
        for h in range(handoffs):
            if s.log[HANDOFFS, h, 0] < at_s:
                at_s, slot, handed = s.log[HANDOFFS, h, 0], NONE, h
        following = ints[FOLLOWING]
        if following < count and s.when[following, ARRIVED] <= min(at_s, until_s):
            now_s = s.when[following, ARRIVED]
            ints[FOLLOWING] += 1
            arrive(s, following, now_s)
            continue
        if at_s > until_s:
            return now_s
        now_s = at_s
        if handed != NONE:
            request = int(s.log[HANDOFFS, handed, 1])
            for h in range(handed, handoffs - 1):
                s.log[HANDOFFS, h, 0] = s.log[HANDOFFS, h + 1, 0]
                s.log[HANDOFFS, h, 1] = s.log[HANDOFFS, h + 1, 1]
            s.pools[HANDOFFS, LOGGED] -= 1
            s.requests[request, NEXT] = NONE
            append_stream(s, request)
            admit(s, now_s)
        elif s.whole[slot, PHASE] == STARTING:
            s.whole[slot, PHASE] = READY
            s.event_s[slot] = math.inf
            s.sums[slot // SLOTS, STARTED] += 1.0
            s.sums[slot // SLOTS, STARTED_S] += now_s - s.real[slot, CREATED]
            admit(s, now_s)
        elif slot < SLOTS:
            prompts_end(s, slot, now_s)
        else:
            epoch_ends(s, slot, now_s)
    return now_s
