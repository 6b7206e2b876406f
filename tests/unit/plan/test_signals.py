"""From pods' sums to windows: differences, new pods, silent pods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tandem_operator.api.fleet import Latency, Percentiles
from tandem_operator.api.pool import PoolSpec, PoolStatus
from tandem_operator.plan.autoscale import PoolPolicy
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.signals import Seen, window_of
from tandem_operator.plan.views import PodView, PoolView
from tandem_runtime.protocol import PodState, PodWork, StepSums

POOL = PoolView(
    "team",
    "chat-prefill",
    "pool",
    "fleet",
    False,
    1,
    PoolSpec.model_validate({"fleetRef": {"name": "chat"}, "role": "prefill", "revision": "r"}),
    PoolStatus(),
    {},
)
LATENCY = Latency(
    time_to_first_token=Percentiles(p50_microseconds=100_000, p95_microseconds=300_000),
)


def policy(percentile: int = 95) -> PoolPolicy:
    return PoolPolicy(POOL, Policy("prefill", 1, 8), False, percentile, 95)


def pod(uid: str, *, ready: bool = True, created_s: float = 0.0, **fields: Any) -> PodView:
    view = PodView(
        "team", uid, uid, "chat", POOL.name, POOL.uid, "prefill", "r", created_s, False, False,
        ready, uid, None, None, None, None, None,
    )  # fmt: skip
    return replace(view, **fields)


def state(work: PodWork | None, waiting: int = 0) -> PodState:
    return PodState("", "", "", "", True, False, 0, waiting, 0, 0.0, 6400, 0.0, 0, work)


def work(requests: int = 0, prompt: int = 0, queued: int = 0, steps: float = 0.0) -> PodWork:
    sums = StepSums(steps, 0.1 * steps, prompt)
    return PodWork(requests, prompt, 0, sums, queued, 0, 2048, 64)


def look(
    pods: list[PodView], states: dict[str, PodState], before: Seen | None, now_s: float = 110.0
) -> tuple[Any, Seen]:
    return window_of(policy(), pods, states, LATENCY, before, now_s)


def test_two_looks_differ_by_what_happened_between() -> None:
    pods = [pod("a"), pod("b")]
    first = {"a": state(work(5, 500, 40, 9)), "b": state(work(1, 100, 0, 1))}
    window, seen = look(pods, first, None, 100.0)
    assert window.load is None, "one look compares with nothing"
    second = {"a": state(work(8, 900, 100, 13), waiting=3), "b": state(work(1, 100, 0, 1))}
    window, _ = look(pods, second, seen)
    load = window.load
    assert (window.window_s, window.ready, window.size) == (10.0, 2, 1)
    # 400 admitted, and the queue grew by 60.
    assert (load.requests, load.prompt_tokens) == (3, 460)
    assert (load.queued_requests, load.queued_tokens) == (3, 100)
    assert (load.steps.steps, load.steps.prompt) == (4, 400)
    assert (load.ttft_ms, load.tpot_ms) == (300.0, None)
    assert load.kv_capacity_tokens == 6400
    p50, _ = window_of(policy(50), pods, second, LATENCY, seen, 110.0)
    assert p50.load is not None
    assert p50.load.ttft_ms == 100.0


def test_a_pod_that_became_ready_counts_whole_and_an_unseen_one_not() -> None:
    _, seen = look([pod("a"), pod("b", ready=False, created_s=95.0)], {}, None, 100.0)
    pods = [pod("a"), pod("b", created_s=95.0)]
    states = {"a": state(work(70, 7000, 0, 70)), "b": state(work(2, 20, 0, 2))}
    window, _ = look(pods, states, seen)
    # Of pod a, which did not answer before, nothing is known.
    assert window.load.requests == 2
    assert window.startup_s == (15.0,)


def test_a_pod_that_started_anew_counts_from_nothing() -> None:
    _, seen = look([pod("a")], {"a": state(work(70, 7000, 0, 70))}, None, 100.0)
    window, _ = look([pod("a")], {"a": state(work(2, 20, 0, 2))}, seen)
    assert (window.load.requests, window.load.prompt_tokens) == (2, 20)
    assert window.startup_s == ()


@pytest.mark.parametrize(("answering", "requests"), [(4, 8), (2, 8), (1, None), (0, None)])
def test_silent_pods_are_like_the_others_while_half_answer(
    answering: int, requests: float | None
) -> None:
    pods = [pod(uid) for uid in "abcd"]
    _, seen = look(pods, {uid: state(work()) for uid in "abcd"}, None, 100.0)
    states = {uid: state(work(2)) for uid in "abcd"[:answering]}
    window, _ = look(pods, states, seen)
    assert (window.load and window.load.requests) == requests


def test_pods_that_say_nothing_of_their_work_leave_the_load_unknown() -> None:
    _, seen = look([pod("a")], {"a": state(None)}, None, 100.0)
    window, _ = look([pod("a")], {"a": state(None)}, seen)
    assert window.load is None


def test_pods_that_leave_or_start_do_not_serve() -> None:
    pods = [
        pod("a"),
        pod("b", ready=False, created_s=80.0),
        pod("c", draining="ScaleIn"),
        pod("d", terminating=True),
        pod("e", finished=True, ready=False),
        pod("f", pool_uid="another"),
    ]
    window, _ = look(pods, {}, None)
    assert (window.ready, window.starting_s, window.draining) == (1, (30.0,), 2)


def test_a_clock_that_was_set_back_is_no_negative_window() -> None:
    _, seen = look([pod("a")], {"a": state(work())}, None, 200.0)
    window, _ = look([pod("a")], {"a": state(work(1))}, seen, 100.0)
    assert window.window_s == 0.0
