"""Measured numbers on their way into a status: rarely, rounded, dropped when old."""

from __future__ import annotations

import msgspec
import pytest
from tandem_operator.plan.latency import Published, merged, publish, two_digits
from tandem_runtime.protocol import FleetLatency


def report(requests: int, ttft_s: float = 0.1, tpot_s: float = 0.01) -> FleetLatency:
    return FleetLatency(requests, ttft_s / 2, ttft_s, tpot_s / 2, tpot_s, requests)


def single_tokens(requests: int, ttft_s: float = 0.1) -> FleetLatency:
    """Of a gateway whose answers had one token each."""
    return FleetLatency(requests, ttft_s / 2, ttft_s)


@pytest.mark.parametrize(
    ("value", "rounded"), [(123_456, 120_000), (8_549, 8_500), (9, 9), (0, 0), (99_999, 100_000)]
)
def test_two_digits(value: int, rounded: int) -> None:
    assert two_digits(value) == rounded


def test_gateways_count_by_their_requests() -> None:
    latency = merged([report(30, ttft_s=0.1), report(10, ttft_s=0.5), report(0, ttft_s=9.0)])
    assert latency is not None
    assert latency.time_to_first_token.p95_microseconds == 200_000
    assert latency.time_to_first_token.p50_microseconds == 100_000


def test_answers_of_one_token_say_nothing_of_the_time_for_more() -> None:
    latency = merged([single_tokens(300, ttft_s=0.1), report(100, ttft_s=0.5, tpot_s=0.04)])
    assert latency is not None
    assert latency.time_to_first_token.p95_microseconds == 200_000
    assert latency.time_per_output_token is not None
    assert latency.time_per_output_token.p95_microseconds == 40_000
    mixed = msgspec.structs.replace(report(300, tpot_s=0.01), tpot_requests=100)
    latency = merged([mixed, report(100, tpot_s=0.03)])
    assert latency is not None
    assert latency.time_per_output_token is not None
    assert latency.time_per_output_token.p95_microseconds == 20_000


def test_a_gateway_that_does_not_say_of_how_many_counts_with_all() -> None:
    """An older one: what a field means when it is absent is what it meant before."""
    older = msgspec.structs.replace(report(300, tpot_s=0.01), tpot_requests=None)
    latency = merged([older, report(100, tpot_s=0.05)])
    assert latency is not None
    assert latency.time_per_output_token is not None
    assert latency.time_per_output_token.p95_microseconds == 20_000
    assert FleetLatency(300, 0.1, 0.2, 0.01, 0.02).tpot_requests is None


def test_without_any_longer_answer_there_is_no_time_per_token() -> None:
    latency = merged([single_tokens(3)])
    assert latency is not None
    assert latency.time_per_output_token is None
    before = publish(Published(), merged([report(1)]), 0.0)
    assert publish(before, latency, 29.0).latency == before.latency
    assert publish(before, latency, 30.0).latency == latency


def test_nothing_asked_is_no_number() -> None:
    assert merged([]) is None
    assert merged([report(0)]) is None


@pytest.mark.parametrize(
    "nonsense",
    [
        report(10, ttft_s=1.7e308),
        report(10, ttft_s=float("nan")),
        report(10, tpot_s=-1.0),
        report(10**400),
        report(-5),
        msgspec.structs.replace(report(10), tpot_requests=11),
        msgspec.structs.replace(report(10), tpot_requests=-1),
        msgspec.structs.replace(report(10), tpot_p50_s=None),
    ],
    ids=[
        "overflow",
        "no number",
        "negative",
        "too many",
        "fewer than none",
        "more than all",
        "fewer than none of two tokens",
        "measured and not",
    ],
)
def test_a_gateway_that_reports_nonsense_is_not_heard(nonsense: FleetLatency) -> None:
    honest = report(10, ttft_s=0.1)
    assert merged([nonsense]) is None
    assert merged([honest, nonsense]) == merged([honest])


def test_the_first_number_is_published_at_once() -> None:
    latency = merged([report(1)])
    assert publish(Published(), latency, 100.0) == Published(latency, 100.0, 100.0)


def test_changes_wait_for_thirty_seconds_and_ten_percent() -> None:
    slow, slower = merged([report(1, 0.1)]), merged([report(1, 0.2)])
    near = merged([report(1, 0.105)])
    first = publish(Published(), slow, 0.0)
    assert publish(first, slower, 29.0).latency == slow
    assert publish(first, slower, 30.0).latency == slower
    assert publish(first, near, 1000.0).latency == slow


def test_numbers_are_dropped_after_five_idle_minutes() -> None:
    latency = merged([report(1)])
    published = publish(Published(), latency, 0.0)
    published = publish(published, latency, 10.0)
    assert publish(published, None, 309.0).latency == latency
    assert publish(published, None, 310.0) == Published()
