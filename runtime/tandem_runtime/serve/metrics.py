"""A pod's metrics. What the engine counts is read when scraped, so tokens cost nothing here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_runtime import contract
from tandem_runtime.engine.stats import EngineStats
from tandem_runtime.frontend.metrics import RequestMetrics
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.kv.handoff.exporter import Exporter
from tandem_runtime.kv.handoff.importer import Importer
from tandem_runtime.kv.tiers.cache import TierCache
from tandem_runtime.protocol import Handoff
from tandem_runtime.serve.kept import KeptStreams
from tandem_runtime.serve.lender import Lender, LentCounters
from tandem_runtime.serve.worker import EngineWorker

_LABELS = ("model_name", "engine")
_HANDOFF_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LOADING_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)


class PodMetrics:
    """`model`: the name in the labels. Observers are for `StreamService` and `Importer`."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._labels = {"model_name": model, "engine": "0"}
        self._requests = RequestMetrics(registry, _LABELS)
        itl = Histogram(
            contract.METRIC_ITL,
            "Time between two tokens of a stream.",
            _LABELS,
            buckets=contract.TPOT_BUCKETS_S,
            registry=registry,
        )
        self.observe_gap = itl.labels(**self._labels).observe
        seconds = Histogram(
            "tandem_handoff_seconds",
            "From the first to the last byte of a stream's KV, on the decode pod.",
            _LABELS,
            buckets=_HANDOFF_BUCKETS_S,
            registry=registry,
        )
        self._handoff_seconds = seconds.labels(**self._labels)
        loading = Histogram(
            "tandem_tier_loading_seconds",
            "How long an engine step waited for pages of cache tiers to be taken in.",
            _LABELS,
            buckets=_LOADING_BUCKETS_S,
            registry=registry,
        )
        self.observe_loading = loading.labels(**self._labels).observe
        pause = Histogram(
            "tandem_migration_pause_seconds",
            "How long a stream that moved stood still, on the pod that it left.",
            _LABELS,
            buckets=_HANDOFF_BUCKETS_S,
            registry=registry,
        )
        self.observe_pause = pause.labels(**self._labels).observe

    def observe(self, record: StreamRecord) -> None:
        self._requests.observe(record, self._labels)

    def observe_handoff(self, handoff: Handoff) -> None:
        self._handoff_seconds.observe(handoff.duration_s)


class EngineCollector(Collector):
    """The engine's gauges and counters, and the handoff's, as of the scrape."""

    def __init__(
        self,
        model: str,
        worker: EngineWorker,
        block_tokens: int,
        exporter: Exporter | None,
        importer: Importer | None,
        tiers: TierCache | None = None,
        lender: Lender | None = None,
    ) -> None:
        self._tiers = tiers
        self._lender = lender
        self._values = [model, "0"]
        self._worker = worker
        self._block_tokens = block_tokens
        self._exporter = exporter
        self._importer = importer

    def collect(self) -> Iterable[Metric]:
        if self._worker.stats is not None:
            yield from self._engine(self._worker.stats)
        yield from self._handoff()
        if self._tiers is not None:
            yield from self._of_tiers(self._tiers)
        if self._lender is not None and self._lender.lends:
            yield from self._lent(self._lender.counters)

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        waiting = stats.waiting + stats.receiving
        yield self._gauge(contract.METRIC_RUNNING, "Streams being computed.", stats.running)
        yield self._gauge(contract.METRIC_WAITING, "Streams that wait, for KV too.", waiting)
        yield self._gauge(contract.METRIC_KV_USAGE, "KV blocks in use, 0..1.", stats.kv_usage)
        yield self._counter(contract.METRIC_PREEMPTIONS, "Streams preempted.", stats.preemptions)
        prompt, cached = stats.prompt_tokens, stats.cached_tokens
        yield self._counter(contract.METRIC_PROMPT_TOKENS, "Prompt tokens admitted.", prompt)
        yield self._counter(contract.METRIC_CACHED_TOKENS, "Of those, from the cache.", cached)
        yield self._counter(contract.METRIC_PREFIX_QUERIES, "Tokens looked up.", prompt)
        yield self._counter(contract.METRIC_PREFIX_HITS, "Tokens found.", cached)
        generated = stats.generated_tokens
        yield self._counter(contract.METRIC_GENERATION_TOKENS, "Tokens generated.", generated)
        info = GaugeMetricFamily(
            contract.METRIC_CACHE_CONFIG,
            "The KV cache.",
            labels=[*_LABELS, "block_size", "num_gpu_blocks"],
        )
        info.add_metric([*self._values, str(self._block_tokens), str(stats.total_blocks)], 1)
        yield info

    def _handoff(self) -> Iterator[Metric]:
        streams = self._family("tandem_handoff_streams", "Streams handed over.", "direction")
        moved = self._family("tandem_handoff_bytes", "KV bytes handed over.", "direction")
        failures = self._family(
            "tandem_handoff_failures", "Streams not handed over.", "direction", "reason"
        )
        ends = (("sent", self._exporter), ("received", self._importer))
        for direction, end in ends:
            if end is not None:
                streams.add_metric([*self._values, direction], end.counters.streams)
                moved.add_metric([*self._values, direction], end.counters.bytes)
                for reason, count in end.counters.failures.items():
                    failures.add_metric([*self._values, direction, reason], count)
        yield from (streams, moved, failures)
        yield from self._migrations()
        if self._importer is not None:
            late = self._importer.late_pages
            yield self._counter("tandem_handoff_late_pages", "Pages of ended streams.", late)

    def _migrations(self) -> Iterator[Metric]:
        outcomes = self._family(
            "tandem_migrations", "Running streams that moved or did not.", "direction", "outcome"
        )
        moved = self._family("tandem_migration_bytes", "KV bytes of such streams.", "direction")
        out = None if self._exporter is None else self._exporter.departures.counters
        into = None if self._importer is None else self._importer.takeovers
        for direction, counters in (("out", out), ("in", into)):
            if counters is not None:
                moved.add_metric([*self._values, direction], counters.bytes)
                for outcome, count in ({"moved": counters.streams} | counters.failures).items():
                    outcomes.add_metric([*self._values, direction, outcome], count)
        yield from (outcomes, moved)

    def _of_tiers(self, tiers: TierCache) -> Iterator[Metric]:
        hits = self._family(
            "tandem_tier_hit_tokens", "Prompt tokens from cache tiers.", "tier", "tenant"
        )
        for (tier, tenant), tokens in tiers.hit_tokens.copy().items():
            hits.add_metric([*self._values, tier, tenant], tokens)
        decoded = self._family(
            "tandem_tier_decoded_hit_tokens", "Those whose KV decode steps computed.", "tier"
        )
        for tier, tokens in tiers.decoded_hit_tokens.copy().items():
            decoded.add_metric([*self._values, tier], tokens)
        moved = self._family("tandem_tier_pages", "Pages moved.", "tier", "what")
        failures = self._family("tandem_tier_failures", "Pages lost.", "tier", "reason")
        pages = GaugeMetricFamily(
            "tandem_tier_resident_pages", "Pages kept.", labels=[*_LABELS, "tier"]
        )
        of_tenants = GaugeMetricFamily(
            "tandem_tier_tenant_pages",
            "Pages kept of tenants that have a part of the tier.",
            labels=[*_LABELS, "tier", "tenant"],
        )
        available = GaugeMetricFamily(
            "tandem_tier_available", "Whether it did what was asked.", labels=[*_LABELS, "tier"]
        )
        for one in tiers.sources:
            moved.add_metric([*self._values, one.name, "loaded"], one.counters.loaded_pages)
            for reason, count in one.counters.failures.copy().items():
                failures.add_metric([*self._values, one.name, reason], count)
        for tier in tiers.tiers:
            counters = tier.counters
            moved.add_metric([*self._values, tier.name, "stored"], counters.stored_pages)
            moved.add_metric([*self._values, tier.name, "evicted"], counters.evicted_pages)
            pages.add_metric([*self._values, tier.name], tier.policy.resident_pages)
            for tenant in tier.policy.named:
                held = tier.policy.pages_of(tenant)
                of_tenants.add_metric([*self._values, tier.name, tenant], held)
            available.add_metric([*self._values, tier.name], counters.available)
        yield from (hits, decoded, moved, failures, pages, of_tenants, available)

    def _lent(self, counters: LentCounters) -> Iterator[Metric]:
        asked = self._family("tandem_peer_questions", "Of other pods for pages.", "outcome")
        for outcome, count in counters.asked.items():
            asked.add_metric([*self._values, outcome], count)
        pages = self._counter("tandem_peer_pages", "Pages given to other pods.", counters.pages)
        yield from (asked, pages)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _family(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(name, text, labels=[*_LABELS, *labels])


class KeptCollector(Collector):
    """Streams that outlive their gateway, as of the scrape."""

    def __init__(self, model: str, kept: KeptStreams) -> None:
        self._values = [model, "0"]
        self._kept = kept

    def collect(self) -> Iterable[Metric]:
        held = GaugeMetricFamily(
            "tandem_held_streams", "Running streams that no gateway reads.", labels=_LABELS
        )
        held.add_metric(self._values, self._kept.held)
        ends = CounterMetricFamily(
            "tandem_stream_holds",
            "Running streams that lost their gateway, by what became of them.",
            labels=[*_LABELS, "outcome"],
        )
        for outcome, count in self._kept.outcomes.items():
            ends.add_metric([*self._values, outcome], count)
        yield from (held, ends)
