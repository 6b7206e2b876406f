"""Counts and durations of each model, as the statistics extension reports them.

All streams of the process count, whichever protocol they came by.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from tandem_runtime.frontend.record import StreamRecord

Json = dict[str, Any]


@dataclass
class _Duration:
    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += int(seconds * 1e9)

    def json(self) -> Json:
        return {"count": self.count, "ns": self.ns}


@dataclass
class _ModelStatistics:
    last_inference_ms: int = 0
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    compute_infer: _Duration = field(default_factory=_Duration)


class Statistics:
    def __init__(self) -> None:
        self._models: dict[str, _ModelStatistics] = {}

    def observe(self, record: StreamRecord) -> None:
        model = self._models.setdefault(record.model, _ModelStatistics())
        model.last_inference_ms = int(time.time() * 1e3)
        assert record.ended_s is not None
        total_s = record.ended_s - record.arrived_s
        if record.finish_reason is None:
            model.fail.add(total_s)
            return
        model.success.add(total_s)
        model.queue.add(record.queue_s)
        model.compute_infer.add(max(0.0, total_s - record.queue_s))

    def of(self, name: str, version: str) -> Json:
        """One entry of `model_stats`. Nothing is copied in or out, so those stay zero."""
        model = self._models.get(name, _ModelStatistics())
        nothing = _Duration().json()
        return {
            "name": name,
            "version": version,
            "last_inference": model.last_inference_ms,
            "inference_count": model.success.count,
            "execution_count": model.success.count,
            "inference_stats": {
                "success": model.success.json(),
                "fail": model.fail.json(),
                "queue": model.queue.json(),
                "compute_input": nothing,
                "compute_infer": model.compute_infer.json(),
                "compute_output": nothing,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [],
        }
