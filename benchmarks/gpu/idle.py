"""What a GPU did, by torch's profiler, and when it did nothing.

All kernels of one replay of a CUDA graph bear the number of its launch (`correlation`); a decode
step is one replay, and what lies between two is sampling, copies and waiting for the host.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

GRAPH_KERNELS: Final = 32
"""Launches that so many kernels share are replays of a graph."""


class Event(NamedTuple):
    """A kernel or copy on the GPU; microseconds."""

    start_us: float
    end_us: float
    launch: int


def gpu_events(run: Callable[[], object]) -> list[Event]:
    """All that the GPU does in `run`, by time; none without a GPU."""
    # The host's side is not recorded where there is a GPU: that would slow it down.
    recorded_side = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[recorded_side]) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        recorded = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted(
        Event(float(e["ts"]), float(e["ts"]) + float(e["dur"]), int(e["args"]["correlation"]))
        for e in recorded
        if e.get("cat") in kinds
    )


def between_graphs_us(events: list[Event]) -> float:
    """Median time between two replays in which no kernel and no copy runs.

    Raises:
        ValueError: there are no two replays.
    """
    launches: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        launches[event.launch].append(event)
    graphs = sorted(
        (group[0].start_us, max(event.end_us for event in group))
        for group in launches.values()
        if len(group) >= GRAPH_KERNELS
    )
    if len(graphs) < 2:
        raise ValueError(f"the trace shows {len(graphs)} replays of a graph, two are needed")
    gaps = []
    for (_, end_us), (start_us, _) in pairwise(graphs):
        between = [e for e in events if e.end_us > end_us and e.start_us < start_us]
        gaps.append(start_us - end_us - _busy_us(between, end_us, start_us))
    return median(gaps)


def _busy_us(events: list[Event], begin_us: float, end_us: float) -> float:
    """Of [begin, end), what the events, sorted by start, cover."""
    busy, at = 0.0, begin_us
    for event in events:
        start, end = max(event.start_us, at), min(event.end_us, end_us)
        if end > start:
            busy += end - start
            at = end
    return busy
