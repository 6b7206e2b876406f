"""The fidelity benchmark's own arithmetic; pods are not needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.traces.trace import Trace

from benchmarks.fidelity import (
    CALIBRATED_S,
    MOST_OUTPUT_TOKENS,
    MOST_PROMPT_TOKENS,
    PER_S,
    Outcome,
    calibrated,
    load_of,
    quantile,
    simulate,
    thinned,
)


def test_the_calibration_finds_what_it_was_played_with() -> None:
    trace = load_of(None, 2 * CALIBRATED_S)
    played = simulate(trace, 1.13)
    later = Outcome([at_s + 0.07 for at_s in played.ttft_s], played.tpot_s)
    slowdown, first_token_s = calibrated(trace, later)
    assert slowdown == pytest.approx(1.13, abs=0.002)
    assert first_token_s == pytest.approx(0.07, abs=0.005)


def test_a_trace_is_thinned_to_the_rate_and_cut_to_what_can_be_played(tmp_path: Path) -> None:
    rows = "".join(f"{100 * i},{20_000 if i == 7 else 900},{2_000}\n" for i in range(6000))
    file = tmp_path / "trace.csv"
    file.write_text("timestamp_ms,input_tokens,output_tokens\n" + rows)
    trace = load_of(file, 300.0)
    assert trace.duration_s == 300.0
    assert len(trace) == pytest.approx(PER_S * 300.0, rel=0.15)
    assert max(trace.prompt_tokens) <= MOST_PROMPT_TOKENS
    assert max(trace.output_tokens) <= MOST_OUTPUT_TOKENS
    sparse = Trace("sparse", [0.0, 50.0], [10, 10], [5, 5], duration_s=100.0)
    assert len(thinned(sparse, PER_S, 0)) == 2, "nothing is added"


def test_failed_requests_and_short_answers_are_left_out() -> None:
    trace = Trace("t", [0.0, 1.0, 2.0, 3.0], [10] * 4, [20, 20, 2, 20], duration_s=4.0)
    outcome = Outcome([0.1, -1.0, 0.3, 0.5], [0.03, 0.0, 9.0, 0.05])
    figures = outcome.figures(trace, 0.0, 4.0)
    assert figures["TTFT p50"] == 0.3
    assert figures["TPOT p50"] == figures["TPOT p95"] == 0.05
    with pytest.raises(ValueError, match="no answer of 16 tokens"):
        outcome.figures(trace, 1.0, 3.0)


def test_quantiles_are_values_that_occurred() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0], 0.95) == 1.0
