"""From what pods and gateways say to the windows that the law looks at.

Pods report sums since their start; two looks differ by what happened between them. A pod that was
not seen before, or started anew, has no difference yet. Of pods that do not answer, the others are
taken to be typical as long as half of them answer; with fewer the load is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from msgspec.structs import astuple
from tandem_runtime.protocol import GatewayState, PodState, PodWork
from tandem_runtime.protocol import StepSums as ReportedSums

from tandem_operator.api.fleet import Latency, Percentiles
from tandem_operator.plan.autoscale import PoolPolicy
from tandem_operator.plan.latency import merged
from tandem_operator.plan.scaling.window import MOST, NO_STEPS, Load, PoolWindow, StepSums
from tandem_operator.plan.views import PodView

LEAST_ANSWERED = 0.5
NO_WORK: Final = PodWork(0, 0, 0, ReportedSums(), 0, 0, 0, 0)


@dataclass(frozen=True)
class Seen:
    """What the look before saw of a pool."""

    at_s: float
    works: Mapping[str, PodWork]
    """By pod uid, of those that answered."""
    started: frozenset[str]
    """Uids of pods that have been Ready."""
    starting: frozenset[str]
    queued_tokens: float


def pods_to_measure(pods: Iterable[PodView], pool_uid: str) -> list[PodView]:
    """The pods whose work is asked for: those that serve, and do not leave."""
    return [p for p in pods if p.pool_uid == pool_uid and _serves(p)]


def window_of(
    policy: PoolPolicy,
    pods: Iterable[PodView],
    states: Mapping[str, PodState],
    latency: Latency | None,
    before: Seen | None,
    now_s: float,
) -> tuple[PoolWindow, Seen]:
    """One look at a pool, and what the next one compares with."""
    own = [p for p in pods if p.pool_uid == policy.pool.uid and not p.finished]
    ready = [p for p in own if _serves(p)]
    starting = [p for p in own if not p.ready and not p.terminating and not p.draining]
    works = {
        p.uid: w for p in ready if (s := states.get(p.uid)) and (w := s.work) and _credible(s, w)
    }
    known = before or Seen(now_s, {}, frozenset(p.uid for p in ready), frozenset(), 0.0)
    seen = Seen(
        at_s=now_s,
        works=works,
        started=(known.started & {p.uid for p in own}) | {p.uid for p in ready},
        starting=frozenset(p.uid for p in starting),
        queued_tokens=float(sum(work.queued_tokens for work in works.values())),
    )
    window = PoolWindow(
        window_s=max(0.0, now_s - known.at_s),
        size=policy.pool.spec.replicas,
        ready=len(ready),
        starting_s=tuple(now_s - p.created_s for p in starting),
        draining=sum(1 for p in own if p.terminating or p.draining),
        startup_s=tuple(
            now_s - p.created_s
            for p in ready
            if p.uid in known.starting and p.uid not in known.started
        ),
        load=_load(policy, ready, states, latency, known, seen) if before else None,
    )
    return window, seen


@dataclass(frozen=True)
class Doorstep:
    """What the gateways know of a fleet."""

    latency: Latency | None = None
    held: int = 0
    """Requests that wait for a pod of the fleet."""
    requests: int = 0
    """Measured in the last minute."""
    answered: bool = False
    """At least one gateway did."""


def doorstep(states: Iterable[GatewayState], fleet: str) -> Doorstep:
    """A fleet at the gateways that answered."""
    seen = list(states)
    reports = [report for state in seen if (report := state.fleets.get(fleet)) is not None]
    return Doorstep(
        latency=merged(reports),
        held=sum(min(max(0, state.held.get(fleet, 0)), int(MOST)) for state in seen),
        requests=sum(min(max(0, report.requests), int(MOST)) for report in reports),
        answered=bool(seen),
    )


def knocked(window: PoolWindow, policy: PoolPolicy, door: Doorstep) -> PoolWindow:
    """The window of a pool without a pod to measure: whether anybody wants one.

    A prefill pool may sleep while its fleet serves: any request of the fleet wakes it.
    """
    if window.ready or window.size > 1 or not door.answered:
        return window
    prefill = policy.pool.spec.role == "prefill"
    load = Load(
        requests=float(door.held + (door.requests if prefill else 0)),
        prompt_tokens=0.0,
        output_tokens=0.0,
        streams=0.0,
        queued_requests=float(door.held),
    )
    return replace(window, load=load)


def _serves(pod: PodView) -> bool:
    return pod.ready and not pod.terminating and not pod.draining and pod.ip is not None


def _load(
    policy: PoolPolicy,
    ready: list[PodView],
    states: Mapping[str, PodState],
    latency: Latency | None,
    before: Seen,
    now: Seen,
) -> Load | None:
    """None where too few of the pods answered, or none is there to answer."""
    answered = [p for p in ready if p.uid in now.works]
    if not answered or len(answered) < LEAST_ANSWERED * len(ready):
        return None
    pods = len(ready) / len(answered)
    window_s = max(now.at_s - before.at_s, 1e-3)
    new = [_since(p.uid, now.works[p.uid], before) for p in answered]
    steps = sum((_steps(work.steps) for work in new), NO_STEPS)
    works = [now.works[p.uid] for p in answered]
    waiting = sum(states[p.uid].waiting for p in answered)
    queued = pods * now.queued_tokens
    prompt = pods * sum(work.prompt_tokens for work in new) + queued - before.queued_tokens
    return Load(
        requests=pods * sum(work.requests for work in new),
        prompt_tokens=max(0.0, prompt),
        output_tokens=pods * sum(work.output_tokens for work in new),
        # Weighted by time, which a look at the end of the window is not.
        streams=pods * steps.seconds_streams / window_s,
        queued_requests=pods * waiting,
        queued_tokens=queued,
        ttft_ms=_ms(latency.time_to_first_token if latency else None, policy.ttft_percentile),
        tpot_ms=_ms(latency.time_per_output_token if latency else None, policy.tpot_percentile),
        steps=steps,
        step_tokens=sum(work.step_tokens for work in works) / len(works),
        kv_tokens=pods * sum(work.kv_tokens for work in works),
        kv_capacity_tokens=sum(states[p.uid].kv_capacity_tokens for p in answered) / len(works),
        max_streams=sum(work.max_streams for work in works) / len(works),
    )


def _ms(measured: Percentiles | None, percentile: int) -> float | None:
    if measured is None:
        return None
    p50 = percentile == 50
    return (measured.p50_microseconds if p50 else measured.p95_microseconds) / 1000.0


def work_since(now: PodWork, past: PodWork) -> StepSums:
    """The steps that a pod took between two looks; none where it started anew or cannot have
    measured that."""
    if past.steps.steps > now.steps.steps or not all(
        0 <= number <= MOST for number in astuple(now.steps)
    ):
        return NO_STEPS
    return _steps(_difference(now.steps, past.steps))


def _since(uid: str, work: PodWork, before: Seen) -> PodWork:
    """What a pod did since the look before."""
    past = before.works.get(uid)
    if past is None:
        # Of one that became Ready meanwhile, everything is new; of another, nothing is known.
        past = work if uid in before.started else NO_WORK
    elif past.requests > work.requests or past.steps.steps > work.steps.steps:
        past = NO_WORK  # It started anew.
    return PodWork(
        requests=work.requests - past.requests,
        prompt_tokens=max(0, work.prompt_tokens - past.prompt_tokens),
        output_tokens=max(0, work.output_tokens - past.output_tokens),
        steps=_difference(work.steps, past.steps),
        queued_tokens=work.queued_tokens,
        kv_tokens=work.kv_tokens,
        step_tokens=work.step_tokens,
        max_streams=work.max_streams,
    )


def _credible(state: PodState, work: PodWork) -> bool:
    """Whether a pod can have measured that: whoever may make pods chooses what they say."""
    counts = (value for value in astuple(work) if not isinstance(value, ReportedSums))
    numbers = (state.waiting, state.kv_capacity_tokens, *counts, *astuple(work.steps))
    return all(0 <= number <= MOST for number in numbers)


def _steps(sums: ReportedSums) -> StepSums:
    return StepSums(*astuple(sums))


def _difference(now: ReportedSums, past: ReportedSums) -> ReportedSums:
    pairs = zip(astuple(now), astuple(past), strict=True)
    return ReportedSums(*(max(0.0, after - first) for after, first in pairs))
