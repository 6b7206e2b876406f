"""What contexts saved: cached tokens and prefill seconds, by tenant, tier and context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from tandem_runtime.frontend.contexts import ContextView
from tandem_runtime.frontend.labels import BoundedLabels
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.protocol import Context

_MOST_CONTEXTS: Final = 100
_MOST_TENANTS: Final = 64
_LABELS: Final = ("fleet", "tenant", "tier", "context")


@dataclass
class _Sums:
    created_unix_s: float
    requests: int = 0
    cached_tokens: int = 0
    saved_s: float = 0.0


class ContextMeter:
    """Counts streams that ended. Labels are bounded: further contexts and tenants are `other`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, _LABELS, registry=registry)

        self._requests = counter("tandem_context_requests", "Streams with a named context.")
        self._tokens = counter(
            "tandem_context_cached_tokens", "Of their contexts' tokens, those not computed again."
        )
        self._saved = counter(
            "tandem_context_saved_prefill_seconds", "What computing these would have taken."
        )
        self._contexts = BoundedLabels(_MOST_CONTEXTS)
        self._tenants = BoundedLabels(_MOST_TENANTS)
        self._sums: dict[str, _Sums] = {}

    def observe(self, record: StreamRecord, view: ContextView) -> None:
        context = view.context
        known = next((copy for copy in view.copies if copy.tier), None)
        cached_tokens = min(record.cached_tokens, view.tokens)
        saved_s = cached_tokens * (known.token_compute_s if known else 0.0)
        sums = self._of(context)
        sums.requests += 1
        sums.cached_tokens += cached_tokens
        sums.saved_s += saved_s
        labels = (
            record.fleet,
            self._tenants.of(context.tenant),
            known.tier if known else "none",
            self._contexts.of(context.id),
        )
        self._requests.labels(*labels).inc()
        self._tokens.labels(*labels).inc(cached_tokens)
        self._saved.labels(*labels).inc(saved_s)

    def of(self, context: Context) -> tuple[int, int, float]:
        """Requests, cached tokens and saved seconds of one context."""
        sums = self._of(context)
        return sums.requests, sums.cached_tokens, sums.saved_s

    def forget(self, context_id: str) -> None:
        """It has expired. Its series stay, and so do those of the contexts that have one."""
        self._sums.pop(context_id, None)

    def _of(self, context: Context) -> _Sums:
        sums = self._sums.get(context.id)
        if sums is None or sums.created_unix_s != context.created_unix_s:
            sums = self._sums[context.id] = _Sums(context.created_unix_s)
        return sums
