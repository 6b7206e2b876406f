"""What a pod keeps of named contexts, as of the scrape.

What an ended context has cost is added to that of `other`, so that sums only grow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_runtime.frontend.labels import OTHER, BoundedLabels
from tandem_runtime.serve.contexts import PodContexts

_LABELS: Final = ("model_name", "engine", "tier", "tenant", "context")
_MOST_CONTEXTS: Final = 100
_MOST_TENANTS: Final = 64


Labels = tuple[str, str, str]
"""Tier, tenant, context."""


class ContextCollector(Collector):
    def __init__(self, model: str, contexts: PodContexts) -> None:
        self._values = [model, "0"]
        self._contexts = contexts
        self._ids = BoundedLabels(_MOST_CONTEXTS)
        self._tenants = BoundedLabels(_MOST_TENANTS)

    def collect(self) -> Iterable[Metric]:
        kept = self._contexts.metered()
        self._ids.keep({context.id for context, _ in kept})
        states = Counter(copy.state for _, copy in kept)
        held_bytes: dict[Labels, float] = defaultdict(float)
        byte_seconds: dict[Labels, float] = defaultdict(float)
        for context, copy in kept:
            labels = (copy.tier, self._tenants.of(context.tenant), self._ids.of(context.id))
            held_bytes[labels] += copy.bytes
            byte_seconds[labels] += copy.byte_seconds
        for (tier, tenant), spent in self._contexts.ended_byte_seconds.items():
            byte_seconds[tier, self._tenants.of(tenant), OTHER] += spent
        count = GaugeMetricFamily(
            "tandem_contexts", "Named contexts of this pod.", labels=[*_LABELS[:2], "state"]
        )
        for state in ("building", "ready", "failed"):
            count.add_metric([*self._values, state], states[state])
        gauge = GaugeMetricFamily(
            "tandem_context_bytes", "KV that is kept for named contexts.", labels=_LABELS
        )
        cost = CounterMetricFamily(
            "tandem_context_byte_seconds", "What keeping it has cost.", labels=_LABELS
        )
        for labels, size in held_bytes.items():
            gauge.add_metric([*self._values, *labels], size)
        for labels, spent in byte_seconds.items():
            cost.add_metric([*self._values, *labels], spent)
        yield from (count, gauge, cost)
