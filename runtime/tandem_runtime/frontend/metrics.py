"""Per-request histograms under vLLM's names, so that its dashboards and scaling rules work."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

from tandem_runtime import contract
from tandem_runtime.frontend.record import StreamRecord


class RequestMetrics:
    """Observes streams that ended. `labels`: the names of the labels, the same for all."""

    def __init__(self, registry: CollectorRegistry, labels: tuple[str, ...]) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        ttft, tpot = contract.TTFT_BUCKETS_S, contract.TPOT_BUCKETS_S
        self._ttft = histogram(contract.METRIC_TTFT, "Time to the first token.", ttft)
        self._tpot = histogram(contract.METRIC_TPOT, "Mean time of the later tokens.", tpot)
        self._e2e = histogram(contract.METRIC_E2E, "Time to the last token.", ttft)
        self._queue = histogram(contract.METRIC_QUEUE_TIME, "Time before computing began.", ttft)
        self._success = Counter(
            contract.METRIC_REQUEST_SUCCESS,
            "Streams that finished, by reason.",
            (*labels, "finished_reason"),
            registry=registry,
        )
        self._failed = Counter(
            "tandem_request_failures",
            "Streams that ended without a finish: failed, or left by their client.",
            labels,
            registry=registry,
        )

    def observe(self, record: StreamRecord, labels: Mapping[str, str]) -> None:
        if record.ttft_s is not None:
            self._ttft.labels(**labels).observe(record.ttft_s)
            self._queue.labels(**labels).observe(record.queue_s)
        if record.tpot_s is not None:
            self._tpot.labels(**labels).observe(record.tpot_s)
        if record.moved:
            return  # the pod that has it now counts its end
        if record.finish_reason is None or record.ended_s is None:
            self._failed.labels(**labels).inc()
            return
        if not record.taken_over:
            self._e2e.labels(**labels).observe(record.ended_s - record.arrived_s)
        self._success.labels(**labels, finished_reason=record.finish_reason).inc()
