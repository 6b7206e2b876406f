"""The decode pool: admission, and epochs of steps until something changes."""

from __future__ import annotations

import math

from benchmarks.autoscaling.compiled.state import (
    BEGUN,
    BUSY,
    CAPACITY,
    COMING,
    CONTEXT,
    DRAINING,
    ENDS,
    EXPIRED,
    FINISHED,
    FREE,
    HAD,
    HEAD,
    HELD,
    JOIN,
    JOIN_TOKENS,
    JOINED,
    JOINING,
    JOINS,
    LEFT,
    MOST_RUNNING,
    NEXT,
    NONE,
    NUM,
    OUTPUT,
    PHASE,
    READY,
    RESERVE_TOKENS,
    RUNNING,
    SLOPE,
    SLOTS,
    STEP,
    STEP_S,
    STEPS,
    STREAMS,
    TAIL,
    WHO,
    State,
    compiled,
    count,
    end,
    expired,
    first_token,
    gone,
    step_s,
)


@compiled
def append_stream(s: State, request: int) -> None:
    if s.ints[TAIL] == NONE:
        s.ints[HEAD] = request
    else:
        s.requests[s.ints[TAIL], NEXT] = request
    s.ints[TAIL] = request
    s.ints[STREAMS] += 1


@compiled
def admit(s: State, now_s: float) -> None:
    """Streams that wait, in order, to the emptiest decode replica with room."""
    ints = s.ints
    while ints[HEAD] != NONE:
        request = ints[HEAD]
        best = NONE
        if not expired(s, request, now_s):
            best = _emptiest(s, s.requests[request, CONTEXT])
            if best == NONE:
                return
        ints[HEAD] = s.requests[request, NEXT]
        ints[STREAMS] -= 1
        if ints[HEAD] == NONE:
            ints[TAIL] = NONE
        if best == NONE:
            end(s, request, EXPIRED, now_s)
            continue
        first_token(s, request, now_s)
        _join(s, best, request, now_s)


@compiled
def _emptiest(s: State, tokens: int) -> int:
    """The replica with room for a stream of so much context that holds the least; else NONE."""
    whole, capacity, most = s.whole, s.ints[CAPACITY], s.ints[MOST_RUNNING]
    best, best_held = NONE, 0
    for slot in range(SLOTS, 2 * SLOTS):
        if whole[slot, PHASE] != READY:
            continue
        streams = whole[slot, RUNNING] + whole[slot, JOINING]
        held = whole[slot, HELD] + whole[slot, JOIN_TOKENS]
        if streams >= most:
            continue
        if streams and held + tokens + RESERVE_TOKENS * (streams + 1) > capacity:
            continue
        younger = best != NONE and whole[slot, NUM] > whole[best, NUM]
        if best == NONE or held < best_held or (held == best_held and not younger):
            best, best_held = slot, held
    return best


@compiled
def _join(s: State, slot: int, request: int, now_s: float) -> None:
    """From the next step on."""
    w = s.whole[slot]
    s.stream[slot, w[JOINING], COMING] = request
    w[JOINING] += 1
    w[JOIN_TOKENS] += s.requests[request, CONTEXT]
    if not w[BUSY]:
        _epoch_begins(s, slot, now_s)
        return
    steps = steps_within(s, slot, now_s - s.real[slot, BEGUN], False)
    if steps < w[STEPS]:
        w[STEPS] = steps
        s.event_s[slot] = s.real[slot, BEGUN] + _epoch_s(s, slot, steps)


@compiled
def _epoch_s(s: State, slot: int, steps: int) -> float:
    growth = s.prices[SLOPE] * s.whole[slot, RUNNING]
    seconds: float = steps * s.real[slot, STEP_S] + growth * steps * (steps - 1) / 2
    return seconds


@compiled
def steps_within(s: State, slot: int, seconds: float, whole: bool) -> int:
    """Steps that fit into so much time, or, not whole, that have begun in it."""
    if seconds <= 0.0:
        return 0
    first_s = s.real[slot, STEP_S]
    half = s.prices[SLOPE] * s.whole[slot, RUNNING] / 2
    linear = first_s - half
    if half > 1e-15 * linear:
        steps = (math.sqrt(linear * linear + 4 * half * seconds) - linear) / (2 * half)
    else:
        steps = seconds / first_s
    count = math.floor(steps + 1e-9) if whole else math.ceil(steps - 1e-9)
    left: int = s.whole[slot, STEPS]
    return min(int(count), left)


@compiled
def commit(s: State, slot: int, steps: int) -> None:
    """So many steps of the epoch are done."""
    if steps <= 0:
        return
    w, running = s.whole[slot], s.whole[slot, RUNNING]
    seconds = _epoch_s(s, slot, steps)
    w[STEP] += steps
    w[HELD] += steps * running
    s.pools[1, OUTPUT] += steps * running
    count(s, 1, float(steps), 0.0, float(running), seconds)
    s.real[slot, BEGUN] += seconds
    w[STEPS] -= steps
    s.real[slot, STEP_S] += s.prices[SLOPE] * running * steps


@compiled
def look(s: State, now_s: float) -> None:
    """Counts the steps that epochs have done by now."""
    for slot in range(SLOTS, 2 * SLOTS):
        if s.whole[slot, PHASE] != FREE and s.whole[slot, BUSY]:
            commit(s, slot, steps_within(s, slot, now_s - s.real[slot, BEGUN], True))


@compiled
def _epoch_begins(s: State, slot: int, now_s: float) -> None:
    w, stream = s.whole[slot], s.stream[slot]
    for i in range(w[JOINING]):
        request, place = stream[i, COMING], w[RUNNING]
        w[JOINS] += 1
        stream[place, WHO], stream[place, JOIN] = request, w[JOINS]
        stream[place, ENDS] = w[STEP] + s.requests[request, LEFT]
        stream[place, JOINED], stream[place, HAD] = w[STEP], s.requests[request, CONTEXT]
        w[RUNNING] += 1
        w[HELD] += s.requests[request, CONTEXT]
    w[JOINING] = w[JOIN_TOKENS] = 0
    s.event_s[slot] = math.inf
    w[BUSY] = 1 if w[RUNNING] else 0
    if not w[RUNNING]:
        return
    room = (s.ints[CAPACITY] - w[HELD]) // w[RUNNING]
    while room < 1 and w[RUNNING] > 1:
        _preempt(s, slot)
        room = (s.ints[CAPACITY] - w[HELD]) // w[RUNNING]
    ends = stream[0, ENDS]
    for i in range(1, w[RUNNING]):
        ends = min(ends, stream[i, ENDS])
    steps = ends - w[STEP]
    w[STEPS] = steps if w[RUNNING] == 1 else min(steps, room)
    base_s = step_s(s, w[RUNNING], w[RUNNING], 0, 0)
    s.real[slot, STEP_S] = base_s + s.prices[SLOPE] * w[HELD]
    s.real[slot, BEGUN] = now_s
    s.event_s[slot] = now_s + _epoch_s(s, slot, w[STEPS])


@compiled
def _leave(s: State, slot: int, place: int) -> int:
    """Takes a stream off the batch; the tokens that it got here."""
    w, stream = s.whole[slot], s.stream[slot]
    generated: int = w[STEP] - stream[place, JOINED]
    w[RUNNING] -= 1
    w[HELD] -= stream[place, HAD] + generated
    for what in range(COMING):
        stream[place, what] = stream[w[RUNNING], what]
    return generated


@compiled
def _preempt(s: State, slot: int) -> None:
    """The youngest stream gives way, and waits before all others."""
    youngest = 0
    for i in range(1, s.whole[slot, RUNNING]):
        if s.stream[slot, i, JOIN] > s.stream[slot, youngest, JOIN]:
            youngest = i
    request = s.stream[slot, youngest, WHO]
    generated = _leave(s, slot, youngest)
    s.requests[request, CONTEXT] += generated
    s.requests[request, LEFT] -= generated
    s.requests[request, NEXT] = s.ints[HEAD]
    s.ints[HEAD] = request
    if s.ints[TAIL] == NONE:
        s.ints[TAIL] = request
    s.ints[STREAMS] += 1


@compiled
def epoch_ends(s: State, slot: int, now_s: float) -> None:
    w = s.whole[slot]
    commit(s, slot, w[STEPS])
    ended, i = 0, 0
    while i < w[RUNNING]:
        if s.stream[slot, i, ENDS] <= w[STEP]:
            request = s.stream[slot, i, WHO]
            _leave(s, slot, i)
            s.requests[request, LEFT] = 0
            end(s, request, FINISHED, now_s)
            ended += 1
        else:
            i += 1
    _epoch_begins(s, slot, now_s)
    if ended and s.ints[HEAD] != NONE:
        admit(s, now_s)
    if w[PHASE] == DRAINING and not w[BUSY]:
        gone(s, slot, now_s)
