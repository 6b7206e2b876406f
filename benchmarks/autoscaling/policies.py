"""The policies, each with one knob: ours as it is shipped, rivals over a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tandem.simulate.scalers import LawGroup, OperatorLaw, Scaler
from tandem_operator.plan.scaling.policy import Policy

from benchmarks.autoscaling.cases import Case
from benchmarks.autoscaling.reference import most_streams
from benchmarks.autoscaling.rivals import (
    Hpa,
    IntervalForecast,
    PerPool,
    SloLaw,
    TokenVelocity,
    concurrency,
    output_work,
    prompt_work,
    queue_depth,
)
from benchmarks.autoscaling.setup import prompt_s

OURS: Final = "tandem"
Make = Callable[[Case, float], Scaler]


def ours(case: Case, setting: float) -> Scaler:
    """The operator's law; its knob is forecast.percent, and the default the one that counts."""
    policies = {
        name: Policy(
            role="prefill" if name == "prefill" else "decode",
            min_replicas=bound.least,
            max_replicas=bound.most,
            ttft_ms=1000.0,
            tpot_ms=1e3 * case.kind.tpot_s,
            gpus_per_replica=case.kind.replica.gpus,
            forecast_percent=int(setting),
        )
        for name, bound in case.bounds.items()
    }
    return OperatorLaw([LawGroup(policies)])


def _hpa(case: Case, target: float) -> Scaler:
    most = most_streams(case.kind, case.trace)
    rules = {"prefill": Hpa(concurrency, target * 4), "decode": Hpa(concurrency, target * most)}
    return PerPool(rules, case.bounds)


def _keda(case: Case, target: float) -> Scaler:
    rules = {name: Hpa(queue_depth, target, every_s=30.0) for name in ("prefill", "decode")}
    return PerPool(rules, case.bounds)


def _slo(case: Case, high: float) -> Scaler:
    low, tpot_ms = high * 0.40 / 0.55, 1e3 * case.kind.tpot_s
    rules = {
        "prefill": SloLaw(lambda load: load.ttft_ms, 1000.0, high, low),
        "decode": SloLaw(lambda load: load.tpot_ms, tpot_ms, high, low),
    }
    return PerPool(rules, case.bounds)


def _profile(case: Case) -> tuple[float, float]:
    """Prompt tokens/s and output tokens/s of a full replica of the trace's mean context."""
    replica, trace = case.kind.replica, case.trace
    streams = most_streams(case.kind, trace)
    context = (sum(trace.prompt_tokens) + sum(trace.output_tokens) / 2) / len(trace)
    return 2048 / prompt_s(replica, 2048), streams / replica.decode_s(streams, streams * context)


def _forecast(case: Case, use: float) -> Scaler:
    prompts, outputs = _profile(case)
    rules = {
        "prefill": IntervalForecast(prompt_work, prompts, use),
        "decode": IntervalForecast(output_work, outputs, use),
    }
    return PerPool(rules, case.bounds)


def _velocity(case: Case, use: float) -> Scaler:
    prompts, outputs = _profile(case)
    rules = {
        "prefill": TokenVelocity(prompt_work, prompts, use),
        "decode": TokenVelocity(output_work, outputs, use),
    }
    return PerPool(rules, case.bounds)


POLICIES: dict[str, tuple[Make, tuple[float, ...]]] = {
    OURS: (ours, (50, 75, 90, 95, 97, 99)),
    "HPA on concurrency": (_hpa, (0.01, 0.03, 0.06, 0.12, 0.25)),
    "KEDA on queue depth": (_keda, (0.02, 0.1, 0.3, 1.0, 5.0)),
    "llm-d SLO law": (_slo, (0.05, 0.1, 0.2, 0.3, 0.55)),
    "forecast per 180 s": (_forecast, (0.1, 0.2, 0.4, 0.6, 0.8)),
    "token velocity": (_velocity, (0.1, 0.2, 0.4, 0.6, 0.8)),
}
"""Each with the grid of its knob."""
DEFAULT: Final = float(Policy("prefill", 1, 1).forecast_percent)
"""Ours is judged at this one."""
