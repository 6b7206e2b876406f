from __future__ import annotations

from tandem_runtime.gateway.latency import LatencyWindows, percentile
from tandem_runtime.gateway.load import FOREIGN_STREAM_TOKENS, Loads
from tandem_runtime.protocol import FleetLatency


def test_own_streams_count_exactly_and_others_at_a_typical_size() -> None:
    loads = Loads()
    loads.begin("a", 100)
    loads.begin("a", 50)
    loads.observe("a", 5, ours=2)
    loads.observe("b", 0, ours=0)
    assert loads.outstanding_tokens() == {"a": 150 + 3 * FOREIGN_STREAM_TOKENS, "b": 0}
    loads.end("a", 100)
    loads.observe("a", 2, ours=2)
    assert loads.outstanding_tokens()["a"] == 50, "one ended while the pod was asked"


def test_a_pod_that_is_gone_is_forgotten_with_its_last_stream() -> None:
    loads = Loads()
    loads.begin("a", 100)
    loads.observe("a", 9, ours=1)
    loads.keep([])
    assert loads.outstanding_tokens() == {"a": 100}
    loads.end("a", 100)
    loads.keep([])
    assert loads.outstanding_tokens() == {}


def test_the_last_minute() -> None:
    windows = LatencyWindows()
    for n in range(100):
        windows.add("chat", ttft_s=n / 100, tpot_s=0.01 if n % 2 else None, now_s=float(n))
    summary = windows.summary(now_s=100.0)["chat"]
    assert summary.requests == 60
    assert summary.ttft_p50_s == 0.69
    assert summary.ttft_p95_s == 0.96
    assert summary.tpot_p95_s == 0.01
    assert windows.summary(now_s=1000.0) == {}


def test_answers_of_one_token_have_no_tpot() -> None:
    windows = LatencyWindows()
    windows.add("chat", 0.2, None, 0.0)
    assert windows.summary(0.0)["chat"] == FleetLatency(1, 0.2, 0.2, None, None, 0)
    windows.add("chat", 0.2, 0.04, 0.0)
    windows.add("chat", 0.2, None, 0.0)
    assert windows.summary(0.0)["chat"] == FleetLatency(3, 0.2, 0.2, 0.04, 0.04, 1)


def test_percentiles_are_nearest_ranks() -> None:
    assert percentile([], 95) == 0.0
    assert percentile([3.0], 50) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 95) == 4.0
