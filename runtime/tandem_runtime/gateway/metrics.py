"""The gateway's metrics, and the last minute of each fleet for `GatewayState`."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tandem_runtime import contract
from tandem_runtime.frontend.metrics import RequestMetrics
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.gateway.latency import LatencyWindows
from tandem_runtime.protocol import FleetLatency


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = RequestMetrics(registry, ("model_name", "fleet"))
        self._windows = LatencyWindows()
        self._registry = registry
        self._failures = Counter(
            "tandem_gateway_attempt_failures",
            "Attempts that failed and were, or may be, repeated elsewhere.",
            ("code", "begun"),
            registry=registry,
        )

        self._migrations = Counter(
            "tandem_gateway_migrations",
            "Moves of running streams from pods that drain.",
            ("outcome",),
            registry=registry,
        )
        self._pause = Histogram(
            "tandem_gateway_migration_pause_seconds",
            "Between the last token of the pod that a stream left and the next pod's first.",
            buckets=contract.TPOT_BUCKETS_S,
            registry=registry,
        )

        self._resumptions = Counter(
            "tandem_gateway_resumptions",
            "Clients that came to go on with a stream of a lost gateway.",
            ("outcome",),
            registry=registry,
        )

    def resumption_ended(self, outcome: str) -> None:
        self._resumptions.labels(outcome=outcome).inc()

    def watch(
        self,
        streams: Callable[[], float],
        view_age_s: Callable[[], float],
        pages: Callable[[], float],
    ) -> None:
        """Gauges that are read when scraped."""
        gauge = Gauge("tandem_gateway_streams", "Streams that run.", registry=self._registry)
        gauge.set_function(streams)
        age = Gauge(
            "tandem_gateway_api_view_age_seconds",
            "Since the Kubernetes API last confirmed the view of the pods.",
            registry=self._registry,
        )
        age.set_function(view_age_s)
        known = Gauge(
            "tandem_gateway_known_pages",
            "Pages of 256 tokens that pods said they hold.",
            registry=self._registry,
        )
        known.set_function(pages)

    def observe(self, record: StreamRecord) -> None:
        self._requests.observe(record, {"model_name": record.model, "fleet": record.fleet})
        if record.ttft_s is not None:
            self._windows.add(record.fleet, record.ttft_s, record.tpot_s, time.monotonic())

    def attempt_failed(self, code: str, *, begun: bool) -> None:
        self._failures.labels(code=code, begun=str(begun).lower()).inc()

    def migration_ended(self, outcome: str) -> None:
        self._migrations.labels(outcome=outcome).inc()

    def migration_paused(self, pause_s: float) -> None:
        self._pause.observe(pause_s)

    def last_minute(self) -> dict[str, FleetLatency]:
        return self._windows.summary(time.monotonic())
