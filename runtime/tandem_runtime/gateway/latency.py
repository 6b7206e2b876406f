"""What clients of each fleet saw over the last minute. Pure; the caller has the clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil
from typing import Final

from tandem_runtime.protocol import FleetLatency

WINDOW_S: Final = 60.0
_MAX_SAMPLES: Final = 10_000


@dataclass(frozen=True)
class _Sample:
    at_s: float
    ttft_s: float
    tpot_s: float | None


class LatencyWindows:
    def __init__(self) -> None:
        self._samples: dict[str, deque[_Sample]] = {}

    def add(self, fleet: str, ttft_s: float, tpot_s: float | None, now_s: float) -> None:
        samples = self._samples.setdefault(fleet, deque(maxlen=_MAX_SAMPLES))
        samples.append(_Sample(now_s, ttft_s, tpot_s))

    def summary(self, now_s: float) -> dict[str, FleetLatency]:
        """Fleets without a request in the window are left out."""
        result = {}
        for fleet, samples in list(self._samples.items()):
            while samples and samples[0].at_s < now_s - WINDOW_S:
                samples.popleft()
            if samples:
                result[fleet] = _latency(samples)
            else:
                del self._samples[fleet]
        return result


def _latency(samples: deque[_Sample]) -> FleetLatency:
    ttft = sorted(sample.ttft_s for sample in samples)
    tpot = sorted(sample.tpot_s for sample in samples if sample.tpot_s is not None)
    return FleetLatency(
        requests=len(samples),
        ttft_p50_s=percentile(ttft, 50),
        ttft_p95_s=percentile(ttft, 95),
        tpot_p50_s=percentile(tpot, 50) if tpot else None,
        tpot_p95_s=percentile(tpot, 95) if tpot else None,
        tpot_requests=len(tpot),
    )


def percentile(ascending: list[float], percent: int) -> float:
    """Nearest rank; 0 of nothing."""
    if not ascending:
        return 0.0
    return ascending[max(0, ceil(percent / 100 * len(ascending)) - 1)]
