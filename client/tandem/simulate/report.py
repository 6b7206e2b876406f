"""What a run comes to: a summary of all requests, and its course over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tandem.simulate.requests import Fate
from tandem.simulate.run import Run

MOST_BUCKETS: Final = 300


@dataclass(frozen=True)
class Percentiles:
    """Of one latency, in seconds; None where nothing was measured."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class PoolSummary:
    """One pool."""

    name: str
    gpu_hours: float
    mean_replicas: float
    max_replicas: int
    scale_events: int
    busy_share: float


@dataclass(frozen=True)
class Summary:
    """A run in numbers."""

    offered: int
    finished: int
    expired: int
    refused: int
    attained: float | None
    """Share of all offered requests within both targets; None: none was offered."""
    ttft_s: Percentiles
    tpot_s: Percentiles
    prompt_tokens: int
    cached_share: float
    output_tokens: int
    pools: tuple[PoolSummary, ...]
    gpu_hours: float
    usd: float
    preemptions: int
    failures: int
    duration_s: float


@dataclass(frozen=True)
class Bucket:
    """A stretch of the run."""

    from_s: float
    requests_per_s: float
    prompt_tokens_per_s: float
    sizes: tuple[float, ...]
    """Replicas asked for, by pool: the mean."""
    ready: tuple[float, ...]
    ttft_s: float | None
    """Of requests that arrived in it, at the target's percentile; a request that got no first
    token counts as one that never did."""
    tpot_s: float | None


def summarise(run: Run, skip_s: float = 0.0) -> Summary:
    """The run without requests that arrived before `skip_s`; GPU-hours are the whole run's."""
    requests, setup = run.requests, run.setup
    counted = [i for i, at_s in enumerate(requests.arrival_s) if at_s >= skip_s]
    fates = [requests.fate[i] for i in counted]
    firsts = [requests.first_token_s[i] for i in counted if requests.first_token_s[i] >= 0]
    steps = [tpot for i in counted if (tpot := output_token_s(run, i)) is not None]
    good = sum(attained(run, i) for i in counted)
    pools = tuple(_pool(run, index) for index in range(len(setup.pools)))
    gpu_hours = sum(pool.gpu_hours for pool in pools)
    return Summary(
        offered=len(counted),
        finished=fates.count(Fate.FINISHED),
        expired=fates.count(Fate.EXPIRED),
        refused=fates.count(Fate.REFUSED),
        attained=good / len(counted) if counted else None,
        ttft_s=_percentiles(firsts),
        tpot_s=_percentiles(steps),
        prompt_tokens=run.prompt_tokens,
        cached_share=run.cached_tokens / run.prompt_tokens if run.prompt_tokens else 0.0,
        output_tokens=sum(
            requests.trace.output_tokens[i] for i in counted if requests.fate[i] is Fate.FINISHED
        ),
        pools=pools,
        gpu_hours=gpu_hours,
        usd=gpu_hours * setup.pools[0].engine.replica.gpu.usd_per_hour,
        preemptions=run.preemptions,
        failures=run.failures,
        duration_s=run.ended_s,
    )


def output_token_s(run: Run, request: int) -> float | None:
    """A finished request's time per output token; None without a second token."""
    requests = run.requests
    more = requests.trace.output_tokens[request] - 1
    if requests.fate[request] is not Fate.FINISHED or more < 1:
        return None
    begun_s = requests.arrival_s[request] + requests.first_token_s[request]
    return (requests.finished_s[request] - begun_s) / more


def attained(run: Run, request: int) -> bool:
    """Whether a request kept both targets."""
    requests = run.requests
    if requests.fate[request] is not Fate.FINISHED:
        return False
    tpot_s = output_token_s(run, request)
    kept = tpot_s is None or tpot_s <= run.setup.tpot_s
    return kept and requests.first_token_s[request] <= run.setup.ttft_s


def quantile_of(values: Sequence[float], quantile: float) -> float | None:
    """The smallest value that so many do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]


def course(run: Run) -> list[Bucket]:
    """The run over time, in at most MOST_BUCKETS stretches of whole looks."""
    samples, setup = run.samples, run.setup
    if not samples:
        return []
    every_s = setup.look_every_s * math.ceil(len(samples) / MOST_BUCKETS)
    count = math.ceil(samples[-1].at_s / every_s)
    firsts: list[list[float]] = [[] for _ in range(count)]
    steps: list[list[float]] = [[] for _ in range(count)]
    tokens = [0] * count
    arrived = [0] * count
    requests = run.requests
    for request, at_s in enumerate(requests.arrival_s):
        index = min(int(at_s / every_s), count - 1)
        arrived[index] += 1
        tokens[index] += requests.trace.prompt_tokens[request]
        first_s = requests.first_token_s[request]
        firsts[index].append(first_s if first_s >= 0 else math.inf)
        tpot_s = output_token_s(run, request)
        if tpot_s is not None:
            steps[index].append(tpot_s)
    buckets = []
    pools = range(len(setup.pools))
    for index in range(count):
        looks = [s for s in samples if index * every_s < s.at_s <= (index + 1) * every_s]
        buckets.append(
            Bucket(
                from_s=index * every_s,
                requests_per_s=arrived[index] / every_s,
                prompt_tokens_per_s=tokens[index] / every_s,
                sizes=tuple(_mean([s.sizes[p] for s in looks]) for p in pools),
                ready=tuple(_mean([s.ready[p] for s in looks]) for p in pools),
                ttft_s=quantile_of(firsts[index], setup.ttft_quantile),
                tpot_s=quantile_of(steps[index], setup.tpot_quantile),
            )
        )
    return buckets


def _pool(run: Run, index: int) -> PoolSummary:
    spec = run.setup.pools[index]
    replica_s = run.replica_s[index]
    return PoolSummary(
        name=spec.name,
        gpu_hours=replica_s * spec.engine.replica.gpus / 3600,
        mean_replicas=replica_s / run.ended_s if run.ended_s else float(spec.replicas),
        max_replicas=max([spec.replicas, *(sample.sizes[index] for sample in run.samples)]),
        scale_events=run.scale_events[index],
        busy_share=run.busy_s[index] / replica_s if replica_s else 0.0,
    )


def _percentiles(values: Sequence[float]) -> Percentiles:
    return Percentiles(*(quantile_of(values, quantile) for quantile in (0.5, 0.95, 0.99)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
