"""The prefill pool: routing, prefix caches, steps of chunks."""

from __future__ import annotations

import math

from benchmarks.autoscaling.compiled.state import (
    ASKED,
    BLOCK,
    BLOCKS,
    BUSY,
    CACHED,
    CAPACITY,
    CHUNK,
    CONTEXT,
    DONE,
    DRAINING,
    EXPIRED,
    FINISHED,
    HANDOFFS,
    KEPT,
    KV_SENT,
    LEFT,
    MOST_RUNNING,
    NEXT,
    NONE,
    NUM,
    PARTIAL,
    PHASE,
    PIECE_TOKENS,
    PIECES,
    PROMPT,
    QHEAD,
    QLEN,
    QTAIL,
    QTOKENS,
    READY,
    REFUSED,
    RESERVE_TOKENS,
    RING,
    RING_FIRST,
    RING_LAST,
    SLOTS,
    STAMP,
    STEP_S,
    State,
    compiled,
    count,
    end,
    expired,
    first_token,
    gone,
    note,
    step_s,
)


@compiled
def arrive(s: State, request: int, now_s: float) -> None:
    """To the replica with the fewest outstanding tokens, this prompt's uncached ones included."""
    whole, tokens = s.whole, s.requests[request, CONTEXT]
    if tokens + s.requests[request, LEFT] > s.ints[CAPACITY]:
        end(s, request, REFUSED, now_s)
        return
    best, best_cost, best_cached = NONE, 0, 0
    for slot in range(SLOTS):
        if whole[slot, PHASE] != READY:
            continue
        cached = 0
        if s.ints[BLOCK]:
            cached = min(_leading(s, slot, request), tokens - 1)
        cost = whole[slot, QTOKENS] + tokens - cached
        if (
            best == NONE
            or cost < best_cost
            or (cost == best_cost and whole[slot, NUM] < whole[best, NUM])
        ):
            best, best_cost, best_cached = slot, cost, cached
    s.requests[request, CACHED] = best_cached
    s.pools[0, ASKED] += 1
    s.pools[0, PROMPT] += tokens - best_cached
    s.requests[request, NEXT] = NONE
    if whole[best, QTAIL] == NONE:
        whole[best, QHEAD] = request
    else:
        s.requests[whole[best, QTAIL], NEXT] = request
    whole[best, QTAIL] = request
    whole[best, QLEN] += 1
    whole[best, QTOKENS] += tokens - best_cached
    if not whole[best, BUSY]:
        _prompts_begin(s, best, now_s)


@compiled
def _leading(s: State, slot: int, request: int) -> int:
    """Tokens of the prompt's beginning that the replica has."""
    first, last = s.requests[request, BLOCKS], s.requests[request + 1, BLOCKS]
    i = first
    while i < last and s.stamps[slot, s.blocks[i]]:
        i += 1
    tokens: int = (i - first) * s.ints[BLOCK]
    return tokens


@compiled
def _store(s: State, slot: int, request: int) -> None:
    """Keeps the prompt's blocks; those used longest ago make room."""
    w = s.whole[slot]
    for i in range(s.requests[request, BLOCKS], s.requests[request + 1, BLOCKS]):
        block = s.blocks[i]
        if not s.stamps[slot, block]:
            w[KEPT] += 1
        s.ints[STAMP] += 1
        s.stamps[slot, block] = s.ints[STAMP]
        if w[RING_LAST] - w[RING_FIRST] == RING:
            _compact(s, slot)
        place = w[RING_LAST] % RING
        s.ring[slot, place, 0], s.ring[slot, place, 1] = block, s.ints[STAMP]
        w[RING_LAST] += 1
    while w[KEPT] > s.ints[CAPACITY] // s.ints[BLOCK]:
        place = w[RING_FIRST] % RING
        block = s.ring[slot, place, 0]
        if s.stamps[slot, block] == s.ring[slot, place, 1]:
            s.stamps[slot, block] = 0
            w[KEPT] -= 1
        w[RING_FIRST] += 1


@compiled
def _compact(s: State, slot: int) -> None:
    """Drops uses that a later use of the same block has replaced."""
    w = s.whole[slot]
    kept = w[RING_FIRST]
    for i in range(w[RING_FIRST], w[RING_LAST]):
        block, stamp = s.ring[slot, i % RING, 0], s.ring[slot, i % RING, 1]
        if s.stamps[slot, block] == stamp:
            s.ring[slot, kept % RING, 0], s.ring[slot, kept % RING, 1] = block, stamp
            kept += 1
    w[RING_LAST] = kept


@compiled
def _prompts_begin(s: State, slot: int, now_s: float) -> None:
    """One step: chunks of the prompts that wait, first come first served."""
    w = s.whole[slot]
    _drop_expired(s, slot, now_s)
    w[BUSY] = 1 if w[QLEN] else 0
    s.event_s[slot] = math.inf
    if not w[QLEN]:
        return
    budget, room, done = s.ints[CHUNK], s.ints[CAPACITY], w[DONE]
    pieces = tokens = pairs = context = 0
    request = w[QHEAD]
    w[PARTIAL] = 0
    while request != NONE and pieces < s.ints[MOST_RUNNING] and budget > 0:
        room -= s.requests[request, CONTEXT] + RESERVE_TOKENS
        if room < 0 and pieces:
            break
        uncached = s.requests[request, CONTEXT] - s.requests[request, CACHED]
        share = min(uncached - done, budget)
        before = s.requests[request, CACHED] + done
        w[PARTIAL] = 0 if done + share == uncached else 1
        pieces += 1
        tokens += share
        pairs += share * before + share * share // 2
        context += before + share
        budget -= share
        done = 0
        request = s.requests[request, NEXT]
    w[PIECES], w[PIECE_TOKENS] = pieces, tokens
    s.real[slot, STEP_S] = step_s(s, tokens, 1, pairs, context)
    s.event_s[slot] = now_s + s.real[slot, STEP_S]


@compiled
def _drop_expired(s: State, slot: int, now_s: float) -> None:
    """Prompts that waited for too long and were not begun."""
    w = s.whole[slot]
    before = w[QHEAD] if w[DONE] else NONE
    request = s.requests[before, NEXT] if w[DONE] else w[QHEAD]
    while request != NONE and expired(s, request, now_s):
        w[QLEN] -= 1
        w[QTOKENS] -= s.requests[request, CONTEXT] - s.requests[request, CACHED]
        end(s, request, EXPIRED, now_s)
        request = s.requests[request, NEXT]
    if before == NONE:
        w[QHEAD] = request
    else:
        s.requests[before, NEXT] = request
    if request == NONE:
        w[QTAIL] = before


@compiled
def prompts_end(s: State, slot: int, now_s: float) -> None:
    w = s.whole[slot]
    count(s, 0, 1.0, float(w[PIECE_TOKENS]), 0.0, s.real[slot, STEP_S])
    w[QTOKENS] -= w[PIECE_TOKENS]
    finished = w[PIECES] - w[PARTIAL]
    # The first prompt's earlier chunks; a prompt that is not through is the last one.
    uncounted = w[PIECE_TOKENS] + w[DONE]
    first, request = w[QHEAD], w[QHEAD]
    for _ in range(finished):
        uncounted -= s.requests[request, CONTEXT] - s.requests[request, CACHED]
        request = s.requests[request, NEXT]
    w[QHEAD] = request
    w[QLEN] -= finished
    if request == NONE:
        w[QTAIL] = NONE
    w[DONE] = uncounted
    w[PIECES] = w[PIECE_TOKENS] = 0
    _prompts_begin(s, slot, now_s)
    request = first
    for _ in range(finished):
        following = s.requests[request, NEXT]
        _prompt_done(s, slot, request, now_s)
        request = following
    if w[PHASE] == DRAINING and not w[BUSY]:
        gone(s, slot, now_s)


@compiled
def _prompt_done(s: State, slot: int, request: int, now_s: float) -> None:
    """Its first token is there; its stream goes to the decode pool."""
    s.requests[request, LEFT] -= 1
    if s.ints[BLOCK]:
        _store(s, slot, request)
    uncached = s.requests[request, CONTEXT] - s.requests[request, CACHED]
    last = (uncached - 1) % s.ints[CHUNK] + 1
    at_s = now_s + last * s.prices[KV_SENT]
    if s.requests[request, LEFT] == 0:
        first_token(s, request, at_s)
        end(s, request, FINISHED, at_s)
        return
    s.pools[1, ASKED] += 1
    note(s, HANDOFFS, at_s, float(request))
