"""What is asked of Prometheus for an autoscaled pool, and how its answers change the window.

Built-in queries read the runtime's and the gateway's own metrics; a policy may replace each of
them. `$fleet` and `$pool` in a query are the names. Every query has to answer with one number.
What steps cost is always the pods' own word: no scrape interval is short enough for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tandem_runtime.contract import (
    METRIC_CACHED_TOKENS,
    METRIC_PROMPT_TOKENS,
    METRIC_RUNNING,
    METRIC_TPOT,
    METRIC_TTFT,
    METRIC_WAITING,
)

from tandem_operator.names import Reason
from tandem_operator.plan.autoscale import PoolPolicy, Trouble
from tandem_operator.plan.promql import PromqlRefused, confined
from tandem_operator.plan.scaling.window import MOST, PoolWindow

LATENCIES = ("timeToFirstToken", "timePerOutputToken")
"""May be NaN or without a series: nobody asked anything."""
_OF_ROLE = {
    "prefill": ("timeToFirstToken", "promptTokensPerSecond", "waitingRequests"),
    "decode": ("timePerOutputToken", "runningRequests", "waitingRequests"),
    "both": (*LATENCIES, "promptTokensPerSecond", "runningRequests", "waitingRequests"),
}


@dataclass(frozen=True)
class Answer:
    """Prometheus' answer to one query: the values of its series, or why there is none."""

    values: tuple[float, ...] = ()
    error: str | None = None


def queries(policy: PoolPolicy, fleet: str) -> dict[str, str]:
    """The pool's queries by signal, confined to its namespace. Raises PromqlRefused, whose sentence
    names the signal."""
    pool = policy.pool
    texts = _built_in(policy) | dict(policy.promql)
    found = {}
    for signal in _OF_ROLE[pool.spec.role]:
        text = texts[signal].replace("$fleet", fleet).replace("$pool", pool.name)
        try:
            found[signal] = confined(text, pool.namespace)
        except PromqlRefused as error:
            raise PromqlRefused(f"promql.{signal} is refused: {error}") from None
    return found


def _built_in(policy: PoolPolicy) -> dict[str, str]:
    window = f"{max(1, round(policy.law.window_s))}s"
    pods = 'pod=~"$pool-[a-z0-9]+-[0-9]+"'
    total = _over_pods(f"rate({METRIC_PROMPT_TOKENS}_total{{{pods}}}[{window}])")
    cached = _over_pods(f"rate({METRIC_CACHED_TOKENS}_total{{{pods}}}[{window}])")
    return {
        "timeToFirstToken": _percentile(METRIC_TTFT, policy.ttft_percentile, window),
        "timePerOutputToken": _percentile(METRIC_TPOT, policy.tpot_percentile, window),
        "promptTokensPerSecond": f"{total} - {cached}",
        "runningRequests": _over_pods(f"{METRIC_RUNNING}{{{pods}}}"),
        "waitingRequests": _over_pods(f"{METRIC_WAITING}{{{pods}}}"),
    }


def _over_pods(selected: str) -> str:
    """The sum over pods. A pod that two jobs scrape counts once."""
    return f"sum(max by (pod) ({selected}))"


def _percentile(metric: str, percentile: int, window: str) -> str:
    """In milliseconds, as the gateways measured it."""
    rate = f'rate({metric}_bucket{{fleet="$fleet"}}[{window}])'
    return f"1000 * histogram_quantile({percentile / 100:g}, sum by (le) ({rate}))"


def with_answers(
    window: PoolWindow, pool: str, answers: Mapping[str, Answer]
) -> tuple[PoolWindow, Trouble | None]:
    """The window with Prometheus' numbers in it. Where one is missing the load is not known."""
    values: dict[str, float | None] = {}
    for signal, answer in answers.items():
        value, fault = _value(signal, answer)
        if fault is not None:
            sentence = f"{signal} of Pool {pool}: {fault}; the pool keeps its size"
            reason = Reason.PROMETHEUS_FAILED if answer.error else Reason.QUERY_UNUSABLE
            return replace(window, load=None), Trouble(reason, sentence)
        values[signal] = value
    load = window.load
    if load is None:
        return window, None
    rate = values.get("promptTokensPerSecond")
    streams, waiting = values.get("runningRequests"), values.get("waitingRequests")
    changed = replace(
        load,
        ttft_ms=values.get("timeToFirstToken"),
        tpot_ms=values.get("timePerOutputToken"),
        prompt_tokens=load.prompt_tokens if rate is None else rate * window.window_s,
        streams=load.streams if streams is None else streams,
        queued_requests=load.queued_requests if waiting is None else waiting,
    )
    return replace(window, load=changed), None


def _value(signal: str, answer: Answer) -> tuple[float | None, str | None]:
    """The signal's value, or what is wrong with the answer."""
    if answer.error is not None:
        return None, answer.error
    if len(answer.values) > 1:
        return None, (
            f"its query returns {len(answer.values)} series where one is needed; wrap it in sum() "
            "or max()"
        )
    if not answer.values:
        if signal in LATENCIES:
            return None, None
        return None, "its query returns no series; see whether Prometheus scrapes the pods"
    (value,) = answer.values
    if -MOST <= value <= MOST:
        return max(0.0, value), None
    return (None, None) if signal in LATENCIES else (None, f"its query returns {value}")
