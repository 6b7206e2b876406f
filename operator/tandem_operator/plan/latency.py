"""What the gateways measured, as it may go into a status.

Percentiles of several gateways are averaged by their numbers of requests: exact merging would need
their histograms, and the error is small while the same balancer feeds them all. A status changes at
most every WRITE_S, and only for a change over CHANGE.
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
    total = sum(report.requests for report in credible)
    if total == 0:
        return None

    def mean(field: str) -> int:
        seconds = sum(getattr(r, field) * r.requests for r in credible) / total
        return two_digits(seconds * 1e6)

    return Latency(
        time_to_first_token=Percentiles(
            p50_microseconds=mean("ttft_p50_s"), p95_microseconds=mean("ttft_p95_s")
        ),
        time_per_output_token=Percentiles(
            p50_microseconds=mean("tpot_p50_s"), p95_microseconds=mean("tpot_p95_s")
        ),
    )


def _credible(report: FleetLatency) -> bool:
    """Whether a pod that says it is a gateway reports what a gateway could have measured: numbers
    that are no number would end the loop that asks all of them."""
    seconds = (report.ttft_p50_s, report.ttft_p95_s, report.tpot_p50_s, report.tpot_p95_s)
    return 0 < report.requests <= MOST_REQUESTS and all(0.0 <= s <= LONGEST_S for s in seconds)


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
    return any(
        abs(new - old) > CHANGE * max(old, 1)
        for old, new in zip(_numbers(before), _numbers(now), strict=True)
    )


def _numbers(latency: Latency) -> tuple[int, ...]:
    return tuple(
        number
        for part in (latency.time_to_first_token, latency.time_per_output_token)
        for number in (part.p50_microseconds, part.p95_microseconds)
    )
