"""How many replicas, of how many GPUs, keep the objectives: the cheapest of all sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from tandem_runtime.roofline.replica import Replica

from tandem.plan.errors import PlanError
from tandem.plan.load import Limits, Load, Targets
from tandem.plan.queueing import wait_quantile_s

_MAX_REPLICAS: Final = 100_000


@dataclass(frozen=True)
class PrefillPool:
    """Replicas that compute prompts."""

    replica: Replica
    replicas: int
    prompt_s: float
    """A prompt alone."""
    wait_s: float
    """At the targets' quantile."""
    handoff_s: float
    """Of the last chunk; the others travel while prefill computes."""
    busy: float
    """Share of time."""

    @property
    def gpus(self) -> int:
        return self.replica.gpus * self.replicas

    @property
    def first_token_s(self) -> float:
        return self.wait_s + self.prompt_s + self.handoff_s

    @property
    def prompts_per_s(self) -> float:
        """That a replica computes when it never idles."""
        return 1.0 / self.prompt_s


@dataclass(frozen=True)
class DecodePool:
    """Replicas that generate."""

    replica: Replica
    replicas: int
    max_batch: int
    """That keeps TPOT and fits the KV cache."""
    bound: str
    """What limits it: TPOT, KV cache or max running."""
    mean_batch: float
    high_batch: float
    """At the targets' quantile: streams come and go by chance."""
    mean_step_s: float
    output_token_s: float
    """A step of the high batch."""

    @property
    def gpus(self) -> int:
        return self.replica.gpus * self.replicas

    @property
    def tokens_per_s(self) -> float:
        """Of one replica at its mean batch."""
        return self.mean_batch / self.mean_step_s


def plan_prefill(
    replicas: Sequence[Replica], load: Load, targets: Targets, limits: Limits
) -> PrefillPool:
    """The pool with the fewest GPUs that keeps TTFT. Raises PlanError."""
    pools = [p for r in replicas if (p := _prefill_pool(r, load, targets, limits))]
    if pools:
        return min(pools, key=lambda pool: (pool.gpus, pool.replica.gpus))
    best = min(replicas, key=lambda r: _unloaded_s(r, load, limits))
    raise PlanError(
        f"a TTFT of {targets.first_token_s * 1e3:g} ms cannot be kept: on {best.gpus} "
        f"{best.gpu.name} {load.uncached_tokens:,} prompt tokens take "
        f"{_unloaded_s(best, load, limits) * 1e3:.4g} ms even alone; ask for more than that, cache "
        "more of the prompt (--cached-tokens), or use a faster GPU"
    )


def plan_decode(
    replicas: Sequence[Replica], load: Load, targets: Targets, limits: Limits
) -> DecodePool:
    """The pool with the fewest GPUs that keeps TPOT. Raises PlanError."""
    pools = [p for r in replicas if (p := _decode_pool(r, load, targets, limits))]
    if pools:
        return min(pools, key=lambda pool: (pool.gpus, pool.replica.gpus))
    best = min(replicas, key=lambda r: r.decode_s(1, load.mean_context_tokens))
    step_s = best.decode_s(1, load.mean_context_tokens)
    read = best.model.read_bytes(1)
    peak = best.gpus * best.gpu.memory_bytes_per_s
    raise PlanError(
        f"a TPOT of {targets.output_token_s * 1e3:g} ms is under the bandwidth limit: at batch 1 "
        f"each token streams {read / 1e9:,.4g} GB of weights, which {best.gpus} {best.gpu.name} of "
        f"{peak / 1e12:.4g} TB/s together cannot do in less than {read / peak * 1e3:.4g} ms, and "
        f"the step takes {step_s * 1e3:.4g} ms with everything counted; ask for more than that, or "
        "use smaller weights or more bandwidth"
    )


# -- prefill ---------------------------------------------------------------------------------------


def handoff_s(replica: Replica, load: Load, limits: Limits) -> float:
    """The last chunk's KV on its way; earlier chunks travel while later ones are computed."""
    last = (load.uncached_tokens - 1) % limits.chunk_tokens + 1
    return last * replica.model.kv_token_bytes / limits.handoff_bytes_per_s


def _prompt_s(replica: Replica, load: Load, limits: Limits) -> float:
    return replica.prompt_s(load.uncached_tokens, load.cached_tokens, limits.chunk_tokens)


def _unloaded_s(replica: Replica, load: Load, limits: Limits) -> float:
    return _prompt_s(replica, load, limits) + handoff_s(replica, load, limits)


def _prefill_pool(
    replica: Replica, load: Load, targets: Targets, limits: Limits
) -> PrefillPool | None:
    """None: not even a prompt alone is fast enough."""
    prompt_s = _prompt_s(replica, load, limits)
    slack_s = targets.first_token_s - _unloaded_s(replica, load, limits)
    if slack_s < 0:
        return None
    offered = load.requests_per_s * prompt_s

    def wait_s(count: int) -> float:
        return wait_quantile_s(
            count, load.requests_per_s, prompt_s, load.prompt_cv, targets.quantile
        )

    count = _least(math.floor(offered) + 1, lambda count: wait_s(count) <= slack_s)
    if count is None:
        return None
    return PrefillPool(
        replica=replica,
        replicas=count,
        prompt_s=prompt_s,
        wait_s=wait_s(count),
        handoff_s=handoff_s(replica, load, limits),
        busy=offered / count,
    )


# -- decode ----------------------------------------------------------------------------------------


def _decode_pool(
    replica: Replica, load: Load, targets: Targets, limits: Limits
) -> DecodePool | None:
    """None: not even a stream alone is fast enough."""
    context = load.mean_context_tokens

    def step_s(batch: float) -> float:
        return replica.decode_s(batch, batch * context)

    if step_s(1) > targets.output_token_s:
        return None
    caps = {
        "max running": limits.max_running,
        "KV cache": replica.kv_capacity_tokens // load.stream_tokens,
    }
    bound = min(caps, key=lambda name: caps[name])
    most = caps[bound]
    if step_s(most) > targets.output_token_s:
        bound = "TPOT"
        most = _greatest(most, lambda batch: step_s(batch) <= targets.output_token_s)
    deviations = NormalDist().inv_cdf(targets.quantile)

    def mean_batch(count: int) -> float:
        return _streams(load.requests_per_s / count * load.output_tokens, step_s, most)

    count = _least(1, lambda count: _high(mean_batch(count), deviations) <= most)
    if count is None:
        return None
    mean = mean_batch(count)
    high = _high(mean, deviations)
    return DecodePool(
        replica=replica,
        replicas=count,
        max_batch=most,
        bound=bound,
        mean_batch=mean,
        high_batch=high,
        mean_step_s=step_s(max(mean, 1.0)),
        output_token_s=step_s(high),
    )


def _high(mean: float, deviations: float) -> float:
    """Streams at the quantile: their number is Poisson's, whose variance is its mean."""
    return max(mean + deviations * math.sqrt(mean), 1.0)


def _streams(tokens_per_s: float, step_s: Callable[[float], float], most: float) -> float:
    """Streams that so many tokens/s keep running (Little's law): m = tokens/s x step(m).

    Infinite where not even `most` streams are fast enough.
    """
    if tokens_per_s * step_s(most) > most:
        return math.inf
    low, high = 0.0, float(most)
    for _ in range(50):
        middle = (low + high) / 2
        if tokens_per_s * step_s(max(middle, 1.0)) > middle:
            low = middle
        else:
            high = middle
    return high


# -- search ----------------------------------------------------------------------------------------


def _least(start: int, fits: Callable[[int], bool]) -> int | None:
    """The least number from `start` on that fits, of a condition that once true stays true."""
    high = start
    while not fits(high):
        high = 2 * high + 1
        if high > _MAX_REPLICAS:
            return None
    low = start
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _greatest(high: int, fits: Callable[[int], bool]) -> int:
    """The greatest number from 1 to `high` that fits; 1 is known to."""
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
