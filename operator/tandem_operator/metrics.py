"""The operator's own metrics, in an explicit registry so that tests run many operators."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tandem_operator import __version__
from tandem_operator.api.node_health import Phase


class Metrics:
    """What the operator says of itself at /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "tandem_operator_reconciles",
            "Reconciles by kind and result",
            ["kind", "result"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "tandem_operator_reconcile_seconds",
            "Duration of a reconcile, its writes included",
            ["kind"],
            registry=self.registry,
        )
        self.actions = Counter(
            "tandem_operator_actions",
            "Actions carried out, by what, why and result",
            ["action", "reason", "result"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "tandem_operator_queue_depth", "Keys that are due or at work", registry=self.registry
        )
        self.queue_failing = Gauge(
            "tandem_operator_queue_failing",
            "Keys whose last reconcile failed",
            registry=self.registry,
        )
        self.leader = Gauge(
            "tandem_operator_leader", "1 while this process may act", registry=self.registry
        )
        self.resync = Gauge(
            "tandem_operator_last_resync_timestamp_seconds",
            "When all keys were last queued",
            registry=self.registry,
        )
        self.nodes = Gauge(
            "tandem_nodes",
            "Nodes with signals of failing, by what is done about them",
            ["phase"],
            registry=self.registry,
        )
        self.nodes_allowed = Gauge(
            "tandem_nodes_in_repair_allowed",
            "Nodes that may be in repair at a time",
            registry=self.registry,
        )
        self._scaling = Gauge(
            "tandem_scaling_decision",
            "The size last decided for an autoscaled pool, by why",
            ["namespace", "pool", "reason"],
            registry=self.registry,
        )
        self._scaling_reasons: dict[tuple[str, str], str] = {}
        info = Gauge("tandem_operator_info", "Build", ["version"], registry=self.registry)
        info.labels(__version__).set(1)

    def scaling_decision(self, namespace: str, pool: str, reason: str, replicas: int) -> None:
        """The last decision for a pool: the series of its former reason ends."""
        former = self._scaling_reasons.get((namespace, pool))
        if former is not None and former != reason:
            self._scaling.remove(namespace, pool, former)
        self._scaling_reasons[namespace, pool] = reason
        self._scaling.labels(namespace, pool, reason).set(replicas)

    def node_health(self, phases: Iterable[str], allowed: int) -> None:
        """What the NodeHealthPolicy's status says."""
        counts = Counts(phases)
        for phase in get_args(Phase):
            self.nodes.labels(phase).set(counts[phase])
        self.nodes_allowed.set(allowed)

    def forget_scaling(self, namespace: str, pool: str) -> None:
        """A pool that is not autoscaled any more has no decision."""
        former = self._scaling_reasons.pop((namespace, pool), None)
        if former is not None:
            self._scaling.remove(namespace, pool, former)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
