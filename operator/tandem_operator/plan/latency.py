"""What the gateways measured, as it may go into a status.

Percentiles of several gateways are averaged by their numbers of requests, TPOT by the requests that
had one: exact merging would need their histograms, and the error is small while the same balancer
feeds them all. A status changes at most every WRITE_S, and only for a change over CHANGE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_runtime.protocol import FleetLatency

from tandem_operator.api.fleet import Latency, Percentiles

WRITE_S = 30.0
CHANGE = 0.10
MOST_REQUESTS = 10**12
LONGEST_S = 86_400.0
DROP_S = 300.0
"""Without requests for that long, the numbers say nothing about now."""


@dataclass(frozen=True)
class Published:
    """The latency in a fleet's status."""

    latency: Latency | None = None
    written_s: float = float("-inf")
    measured_s: float = float("-inf")


def two_digits(value: float) -> int:
    """Rounded to two significant digits."""
    return int(float(f"{value:.2g}"))


def merged(reports: Sequence[FleetLatency]) -> Latency | None:
    """One fleet's latency over its gateways; None when nothing was asked."""
    credible = [report for report in reports if _credible(report)]
    ttft = _mean([(r.requests, r.ttft_p50_s, r.ttft_p95_s) for r in credible])
    if ttft is None:
        return None
    tpot = _mean(
        [
            (r.requests if r.tpot_requests is None else r.tpot_requests, r.tpot_p50_s, r.tpot_p95_s)
            for r in credible
            if r.tpot_p50_s is not None and r.tpot_p95_s is not None
        ]
    )
    return Latency(time_to_first_token=ttft, time_per_output_token=tpot)


def _mean(parts: Sequence[tuple[int, float, float]]) -> Percentiles | None:
    """Of requests, their 50th and their 95th percentile in seconds; None without requests."""
    total = sum(requests for requests, _, _ in parts)
    if total == 0:
        return None
    p50_s = sum(requests * p50_s for requests, p50_s, _ in parts) / total
    p95_s = sum(requests * p95_s for requests, _, p95_s in parts) / total
    return Percentiles(
        p50_microseconds=two_digits(p50_s * 1e6), p95_microseconds=two_digits(p95_s * 1e6)
    )


def _credible(report: FleetLatency) -> bool:
    """Whether a pod that says it is a gateway reports what a gateway could have measured: numbers
    that are no number would end the loop that asks all of them."""
    tpot = (report.tpot_p50_s, report.tpot_p95_s)
    if report.tpot_requests and None in tpot:
        return False
    seconds = [s for s in (report.ttft_p50_s, report.ttft_p95_s, *tpot) if s is not None]
    return (
        0 < report.requests <= MOST_REQUESTS
        and 0 <= (report.tpot_requests or 0) <= report.requests
        and all(0.0 <= s <= LONGEST_S for s in seconds)
    )


def publish(before: Published, measured: Latency | None, now_s: float) -> Published:
    """What the status says from now on."""
    if measured is None:
        recent = 0.0 <= now_s - before.measured_s < DROP_S
        return before if recent else Published()
    # Less than nothing: the clock was set back.
    settled = before.latency is not None and (
        0.0 <= now_s - before.written_s < WRITE_S or not _differs(before.latency, measured)
    )
    if settled:
        return Published(before.latency, before.written_s, now_s)
    return Published(measured, now_s, now_s)


def _differs(before: Latency, now: Latency) -> bool:
    old, new = _numbers(before), _numbers(now)
    return len(old) != len(new) or any(
        abs(after - first) > CHANGE * max(first, 1) for first, after in zip(old, new, strict=True)
    )


def _numbers(latency: Latency) -> tuple[int, ...]:
    return tuple(
        number
        for part in (latency.time_to_first_token, latency.time_per_output_token)
        if part is not None
        for number in (part.p50_microseconds, part.p95_microseconds)
    )
