"""The simulator's events compiled: a run of a million requests takes seconds.

The same rules as tandem.simulate.world and engine, for what this benchmark needs of them: a prefill
and a decode pool with at least one replica each, of which none fails. tests/unit/simulate holds
the two equal, request by request; the readable one is the reference.

Replicas live in slots, prefill's before decode's. Waiting prompts and streams are linked lists over
the requests, as each waits in one place at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from numba import njit

SLOTS = 64
"""Of each pool."""
WIDEST = 64
"""Streams of a replica, at most."""
RING = 8192
"""Uses of blocks that a replica's cache keeps in order."""
FREE, STARTING, READY, DRAINING = 0, 1, 2, 3
OPEN, FINISHED, EXPIRED, REFUSED = 0, 1, 2, 3
RESERVE_TOKENS = 64
NONE = -1
# Columns of the arrays of State.
ARRIVED, FIRST, ENDED = range(3)
CONTEXT, LEFT, ASKED_FOR, CACHED, FATE, NEXT, BLOCKS = range(7)
(FOLLOWING, STILL_OPEN, STREAMS, HEAD, TAIL, NUMBER, STAMP,
 CHUNK, MOST_RUNNING, CAPACITY, BLOCK) = range(11)  # fmt: skip
FIRSTS, OUTPUTS, HANDOFFS = range(3)
SIZE, ASKED, PROMPT, OUTPUT, EVENTS, LOGGED = range(6)
STEP_SUMS, GONE_S, STARTED, STARTED_S = slice(0, 9), 9, 10, 11
(LAYER, HEADS, WEIGHTS, PAIR, KV_READ, FIXED, TOKEN, SLOPE, KV_SENT, EXPIRY, SLOWDOWN) = range(11)
(PHASE, NUM, QHEAD, QTAIL, QLEN, QTOKENS, DONE, PIECES, PIECE_TOKENS, PARTIAL, RUNNING, HELD,
 JOINING, JOIN_TOKENS, STEP, STEPS, JOINS, BUSY, KEPT, RING_FIRST, RING_LAST,
) = range(21)  # fmt: skip
CREATED, BEGUN, STEP_S = range(3)
WHO, ENDS, JOIN, JOINED, HAD, COMING = range(6)


class State(NamedTuple):
    """Everything of a run, as a few arrays: each costs at every call."""

    when: Any
    """By request, seconds: ARRIVED, FIRST (since then), ENDED."""
    requests: Any
    """By request, and one more for the end of its blocks: CONTEXT ... BLOCKS."""
    ints: Any
    """FOLLOWING ... BLOCK."""
    pools: Any
    """By pool: SIZE ... EVENTS; LOGGED by log."""
    sums: Any
    """By pool: steps since the last look, seconds of replicas that are gone, start-ups."""
    prices: Any
    """LAYER ... SLOWDOWN, in seconds."""
    whole: Any
    """By slot: PHASE ... RING_LAST."""
    real: Any
    """By slot: CREATED, BEGUN, STEP_S."""
    event_s: Any
    """By slot: when what it does now ends."""
    stream: Any
    """By slot and place: WHO ... HAD of running streams, COMING streams."""
    log: Any
    """FIRSTS, OUTPUTS: (time, latency); HANDOFFS: (time, request) of those on their way."""
    blocks: Any
    ring: Any
    """By prefill slot: (block, stamp) in order of use."""
    stamps: Any
    """By prefill slot and block: when it was used last; 0: it is not there."""


F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Nothing here allocates: without reference counts of the arrays a call costs a tenth."""
    return cast(F, njit(cache=True, _nrt=False)(function))


@compiled
def end(s: State, request: int, fate: int, now_s: float) -> None:
    s.requests[request, FATE] = fate
    s.when[request, ENDED] = now_s
    s.ints[STILL_OPEN] -= 1
    more = s.requests[request, ASKED_FOR] - 1
    if fate == FINISHED and more > 0:
        spent_s = now_s - s.when[request, ARRIVED] - s.when[request, FIRST]
        note(s, OUTPUTS, now_s, spent_s / more)


@compiled
def first_token(s: State, request: int, at_s: float) -> None:
    if s.when[request, FIRST] < 0.0:
        s.when[request, FIRST] = at_s - s.when[request, ARRIVED]
        note(s, FIRSTS, at_s, s.when[request, FIRST])


@compiled
def note(s: State, log: int, at_s: float, value: float) -> None:
    place = s.pools[log, LOGGED]
    s.log[log, place, 0], s.log[log, place, 1] = at_s, value
    s.pools[log, LOGGED] += 1


@compiled
def expired(s: State, request: int, now_s: float) -> bool:
    late: bool = now_s - s.when[request, ARRIVED] > s.prices[EXPIRY]
    return late and s.when[request, FIRST] < 0.0


@compiled
def create(s: State, pool: int, now_s: float, startup_s: float) -> None:
    """A new replica in the first free slot."""
    slot = pool * SLOTS
    while s.whole[slot, PHASE] != FREE:
        slot += 1
    s.whole[slot] = 0
    s.whole[slot, PHASE] = STARTING if startup_s > 0.0 else READY
    s.whole[slot, NUM] = s.ints[NUMBER]
    s.whole[slot, QHEAD] = s.whole[slot, QTAIL] = NONE
    s.ints[NUMBER] += 1
    if pool == 0:
        s.stamps[slot] = 0
    s.real[slot, CREATED] = now_s
    s.event_s[slot] = now_s + startup_s if startup_s > 0.0 else math.inf


@compiled
def gone(s: State, slot: int, now_s: float) -> None:
    """The replica is deleted."""
    s.whole[slot, PHASE] = FREE
    s.event_s[slot] = math.inf
    s.sums[slot // SLOTS, GONE_S] += now_s - s.real[slot, CREATED]


@compiled
def step_s(s: State, tokens: int, sampled: int, pairs: int, context: int) -> float:
    p = s.prices
    linear_s = max(p[LAYER] * tokens + p[HEADS] * sampled, p[WEIGHTS])
    attention_s = max(p[PAIR] * pairs, p[KV_READ] * context)
    seconds: float = p[SLOWDOWN] * (linear_s + attention_s + p[FIXED] + p[TOKEN] * tokens)
    return seconds


@compiled
def count(s: State, pool: int, n: float, prompt: float, streams: float, seconds: float) -> None:
    sums = s.sums[pool]
    sums[0] += n
    sums[1] += seconds
    sums[2] += prompt
    sums[3] += n * streams
    sums[4] += prompt * prompt
    sums[5] += prompt * streams
    sums[6] += n * streams * streams
    sums[7] += seconds * prompt
    sums[8] += seconds * streams
