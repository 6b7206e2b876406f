"""Runs of the compiled simulator: the same windows, scalers and results as tandem.simulate's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tandem.simulate.run import Setup, SimulationError
from tandem.simulate.scalers import Scaler
from tandem.traces.trace import Trace
from tandem_operator.plan.scaling.window import Load, PoolWindow, StepSums
from tandem_runtime.roofline.replica import Replica

from benchmarks.autoscaling.compiled import events, streams
from benchmarks.autoscaling.compiled import state as core
from benchmarks.autoscaling.compiled.state import SLOTS, State

LATENCY_WINDOW_S: Final = 60.0
_PATIENCE_S: Final = 86_400.0
NAMES: Final = ("prefill", "decode")


@dataclass(frozen=True)
class FastRun:
    """What came out; arrays by request."""

    trace: Trace
    fate: Any
    first_token_s: Any
    """Since arrival; negative: none."""
    finished_s: Any
    cached: Any
    ended_s: float
    at_s: Any
    """Of looks."""
    replica_s: Any
    """At each look and at the end, by pool, since the beginning."""
    sizes: Any
    """At each look, by pool, before its decision."""
    scale_events: tuple[int, int]


def simulate(setup: Setup, trace: Trace, scaler: Scaler) -> FastRun:
    """One run. Raises SimulationError where it does not end."""
    state, startup_s = _state(setup, trace), setup.pools[0].startup_s
    for pool, spec in enumerate(setup.pools):
        _check_room(state, pool, spec.replicas)
        for _ in range(spec.replicas):
            core.create(state, pool, 0.0, 0.0)
        state.pools[pool, core.SIZE] = spec.replicas
    now_s, look_s, end_s = 0.0, 0.0, trace.duration_s
    looks: list[tuple[float, list[float], list[int]]] = []
    while True:
        before_s, look_s = look_s, look_s + setup.look_every_s
        now_s = events.advance(state, look_s, end_s, now_s)
        if not state.ints[core.STILL_OPEN] and now_s >= end_s:
            break
        if look_s > end_s + _PATIENCE_S:
            raise SimulationError("a day after the trace's end there are requests that run")
        now_s = look_s
        streams.admit(state, now_s)
        streams.look(state, now_s)
        windows = _windows(state, setup, now_s, now_s - before_s)
        for name, choice in scaler.decide(windows, now_s).items():
            _resize(state, NAMES.index(name), choice.target, now_s, startup_s)
        looks.append((now_s, _replica_s(state, now_s), [windows[n].size for n in NAMES]))
        _reset(state)
    looks.append((now_s, _replica_s(state, now_s), [int(x) for x in state.pools[:2, core.SIZE]]))
    return FastRun(
        trace, state.requests[:-1, core.FATE], state.when[:, core.FIRST],
        state.when[:, core.ENDED], state.requests[:-1, core.CACHED], now_s,
        np.array([at_s for at_s, _, _ in looks]), np.array([r for _, r, _ in looks]),
        np.array([sizes for _, _, sizes in looks]),
        (int(state.pools[0, core.EVENTS]), int(state.pools[1, core.EVENTS])),
    )  # fmt: skip


def prices_of(setup: Setup) -> Any:
    """A step's cost as factors: of Replica.step_s, for a dense model."""
    engine = setup.pools[1].engine
    replica: Replica = engine.replica
    shape = replica.model.shape
    one, two = replica.fixed_s(1.0), replica.fixed_s(2.0)
    prices = np.zeros(11)
    prices[core.LAYER] = 2 * shape.layer_params / replica.flop_per_s
    prices[core.HEADS] = 2 * shape.head_params / replica.flop_per_s
    prices[core.WEIGHTS] = replica.model.read_bytes(1.0) / replica.bytes_per_s
    prices[core.PAIR] = replica.attention_s(1e9, 0.0) / 1e9
    prices[core.KV_READ] = replica.attention_s(0.0, 1e9) / 1e9
    prices[core.FIXED], prices[core.TOKEN] = 2 * one - two, two - one
    prices[core.SLOPE] = engine.slope_s
    prices[core.KV_SENT] = replica.model.kv_token_bytes / setup.handoff_bytes_per_s
    prices[core.EXPIRY] = setup.expiry_s
    prices[core.SLOWDOWN] = engine.slowdown
    return prices


def _state(setup: Setup, trace: Trace) -> State:
    count, engine = len(trace), setup.pools[1].engine
    if engine.max_running > core.WIDEST or tuple(s.name for s in setup.pools) != NAMES:
        raise SimulationError("the compiled simulator takes a prefill and a decode pool of at most "
                              f"{core.WIDEST} streams a replica")  # fmt: skip
    cached = trace.blocks is not None
    requests = np.zeros((count + 1, 7), np.int64)
    requests[:-1, core.CONTEXT] = trace.prompt_tokens
    requests[:-1, core.LEFT] = requests[:-1, core.ASKED_FOR] = trace.output_tokens
    blocks = np.zeros(0, np.int64)
    if trace.blocks is not None:
        requests[1:, core.BLOCKS] = np.cumsum([len(b) for b in trace.blocks])
        named = np.fromiter((b for each in trace.blocks for b in each), np.int64)
        blocks = np.unique(named, return_inverse=True)[1].astype(np.int64)
    when = np.full((count, 3), -1.0)
    when[:, core.ARRIVED] = trace.arrival_s
    ints = np.zeros(11, np.int64)
    ints[core.STILL_OPEN], ints[core.HEAD], ints[core.TAIL] = count, core.NONE, core.NONE
    ints[core.CHUNK], ints[core.MOST_RUNNING] = engine.chunk_tokens, engine.max_running
    ints[core.CAPACITY], ints[core.BLOCK] = engine.capacity_tokens, trace.block_tokens * cached
    return State(
        when=when,
        requests=requests,
        ints=ints,
        pools=np.zeros((3, 6), np.int64),
        sums=np.zeros((2, 12)),
        prices=prices_of(setup),
        whole=np.zeros((2 * SLOTS, 21), np.int64),
        real=np.zeros((2 * SLOTS, 3)),
        event_s=np.full(2 * SLOTS, math.inf),
        stream=np.zeros((2 * SLOTS, core.WIDEST, 6), np.int64),
        log=np.zeros((3, count, 2)),
        blocks=blocks,
        ring=np.zeros((SLOTS, core.RING if cached else 1, 2), np.int64),
        stamps=np.zeros((SLOTS, int(blocks.max(initial=-1)) + 1), np.int32),
    )


def _windows(state: State, setup: Setup, now_s: float, window_s: float) -> dict[str, PoolWindow]:
    ttft_s = _recent(state, core.FIRSTS, now_s, setup.ttft_quantile)
    tpot_s = _recent(state, core.OUTPUTS, now_s, setup.tpot_quantile)
    return {
        name: _window(state, setup, pool, (ttft_s, tpot_s), now_s, window_s)
        for pool, name in enumerate(NAMES)
    }


def _window(
    state: State, setup: Setup, pool: int, latencies_s: tuple[float | None, float | None],
    now_s: float, window_s: float,
) -> PoolWindow:  # fmt: skip
    """As tandem.simulate.observe.window_of makes it."""
    engine, (ttft_s, tpot_s) = setup.pools[pool].engine, latencies_s
    slots = slice(pool * SLOTS, (pool + 1) * SLOTS)
    whole, real = state.whole[slots], state.real[slots]
    phase = whole[:, core.PHASE]
    live, starting = phase != core.FREE, phase == core.STARTING
    waiting = int(state.ints[core.STREAMS]) if pool else 0
    queued = whole[live, core.QLEN] - whole[live, core.PIECES]
    tokens = whole[live, core.QTOKENS] - whole[live, core.PIECE_TOKENS]
    startups = int(state.sums[pool, core.STARTED])
    load = Load(
        requests=int(state.pools[pool, core.ASKED]),
        prompt_tokens=int(state.pools[pool, core.PROMPT]),
        output_tokens=int(state.pools[pool, core.OUTPUT]),
        streams=int((whole[live, core.RUNNING] + whole[live, core.JOINING]).sum()),
        queued_requests=waiting + int(queued.sum()),
        queued_tokens=int(tokens.sum()),
        ttft_ms=None if ttft_s is None else 1e3 * ttft_s,
        tpot_ms=None if tpot_s is None else 1e3 * tpot_s,
        steps=StepSums(*(float(value) for value in state.sums[pool, core.STEP_SUMS])),
        step_tokens=engine.chunk_tokens,
        kv_tokens=int(whole[live, core.HELD].sum()),
        kv_capacity_tokens=engine.capacity_tokens,
        max_streams=engine.max_running,
    )
    return PoolWindow(
        window_s=window_s,
        size=int(state.pools[pool, core.SIZE]),
        ready=int((phase == core.READY).sum()),
        starting_s=tuple(float(now_s - x) for x in real[starting, core.CREATED]),
        draining=int((phase == core.DRAINING).sum()),
        startup_s=(float(state.sums[pool, core.STARTED_S]) / max(startups, 1),) * startups,
        load=load,
    )


def _recent(state: State, which: int, now_s: float, quantile: float) -> float | None:
    """A latency of the last minute at the quantile."""
    log, count = state.log[which], int(state.pools[which, core.LOGGED])
    first = int(np.searchsorted(log[:count, 0], now_s - LATENCY_WINDOW_S))
    values = log[first:count, 1]
    if not len(values):
        return None
    place = min(int(quantile * len(values)), len(values) - 1)
    return float(np.partition(values, place)[place])


def _reset(state: State) -> None:
    """What is counted since the last look."""
    state.sums[:, core.STEP_SUMS] = 0.0
    state.sums[:, (core.STARTED, core.STARTED_S)] = 0.0
    state.pools[:2, (core.ASKED, core.PROMPT, core.OUTPUT)] = 0


def _replica_s(state: State, now_s: float) -> list[float]:
    totals = []
    for pool in range(2):
        slots = slice(pool * SLOTS, (pool + 1) * SLOTS)
        live = state.whole[slots, core.PHASE] != core.FREE
        created = state.real[slots, core.CREATED][live]
        totals.append(float(state.sums[pool, core.GONE_S] + (now_s - created).sum()))
    return totals


def _resize(state: State, pool: int, target: int, now_s: float, startup_s: float) -> None:
    """New pods, or who leaves: the youngest that start, then those with the least to lose."""
    if target == state.pools[pool, core.SIZE]:
        return
    state.pools[pool, core.EVENTS] += 1
    state.pools[pool, core.SIZE] = target
    whole, live = state.whole, []
    for slot in range(pool * SLOTS, (pool + 1) * SLOTS):
        w = whole[slot]
        streams = w[core.RUNNING] + w[core.JOINING]
        outstanding = w[core.QTOKENS] + w[core.HELD] + w[core.JOIN_TOKENS]
        if w[core.PHASE] == core.STARTING:
            live.append((0, -w[core.NUM], 0, 0, slot))
        elif w[core.PHASE] == core.READY:
            live.append((1, streams, outstanding, w[core.NUM], slot))
    _check_room(state, pool, target - len(live))
    for _ in range(target - len(live)):
        core.create(state, pool, now_s, startup_s)
    for kind, *_, slot in sorted(live)[: max(len(live) - target, 0)]:
        whole[slot, core.PHASE] = core.DRAINING
        empty = not (whole[slot, core.BUSY] or whole[slot, core.QLEN] or whole[slot, core.JOINING])
        if kind == 0 or empty:
            core.gone(state, slot, now_s)


def _check_room(state: State, pool: int, more: int) -> None:
    """Raises SimulationError."""
    used = state.whole[pool * SLOTS : (pool + 1) * SLOTS, core.PHASE] != core.FREE
    if more > SLOTS - used.sum():
        raise SimulationError(
            f"{NAMES[pool]} needs {more} replicas beside {used.sum()} that run or drain: the "
            f"compiled simulator has {SLOTS}; take fewer --peak-replicas or less --headroom"
        )
