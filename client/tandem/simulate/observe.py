"""What a policy sees of the simulated pools: the same windows that the operator takes live.

Nothing that could not be measured: no output lengths beforehand, no cache hits of prompts to come.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tandem_operator.plan.scaling.window import NO_STEPS, Load, PoolWindow

from tandem.simulate.pool import Phase, PoolState

LATENCY_WINDOW_S = 60.0


class Recent:
    """Latencies of the last minute."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque()

    def add(self, at_s: float, value: float) -> None:
        self._values.append((at_s, value))

    def quantile(self, quantile: float, now_s: float) -> float | None:
        """None: nothing was measured."""
        values = self._values
        while values and values[0][0] < now_s - LATENCY_WINDOW_S:
            values.popleft()
        if not values:
            return None
        ordered = sorted(value for _, value in values)
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]


@dataclass
class Counts:
    """Of one pool since the last look."""

    requests: int = 0
    prompt_tokens: int = 0
    startups_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Waiting:
    """What waits for a pool outside its replicas."""

    requests: int
    tokens: int


def window_of(
    pool: PoolState,
    counts: Counts,
    waiting: Waiting,
    latencies_s: tuple[float | None, float | None],
    window_s: float,
    now_s: float,
) -> PoolWindow:
    """One look. Engines' counters start again from zero."""
    spec = pool.spec
    for replica in pool.replicas:
        replica.engine.look(now_s)
        pool.collect(replica)
    engines = [replica.engine for replica in pool.replicas]
    ttft_s, tpot_s = latencies_s
    load = Load(
        requests=counts.requests,
        prompt_tokens=counts.prompt_tokens,
        output_tokens=pool.output_tokens,
        streams=sum(engine.streams for engine in engines),
        queued_requests=waiting.requests + sum(e.waiting_requests for e in engines),
        queued_tokens=waiting.tokens + sum(e.waiting_tokens for e in engines),
        ttft_ms=None if ttft_s is None else 1e3 * ttft_s,
        tpot_ms=None if tpot_s is None else 1e3 * tpot_s,
        steps=pool.sums,
        step_tokens=spec.engine.chunk_tokens,
        kv_tokens=sum(engine.context_tokens for engine in engines),
        kv_capacity_tokens=spec.engine.capacity_tokens,
        max_streams=spec.engine.max_running,
    )
    pool.sums, pool.output_tokens = NO_STEPS, 0
    return PoolWindow(
        window_s=window_s,
        size=pool.size,
        ready=len(pool.of_phase(Phase.READY)),
        starting_s=tuple(now_s - r.created_s for r in pool.of_phase(Phase.STARTING)),
        draining=len(pool.of_phase(Phase.DRAINING)),
        startup_s=tuple(counts.startups_s),
        load=load,
    )
