"""The straggler benchmark's parts: recorded windows that are played again, percentiles."""

from __future__ import annotations

import math
import random

from tandem_operator.plan.scaling.window import NO_STEPS, StepSums, step

from benchmarks.stragglers.load import Answer, tpot_p99_ms
from benchmarks.stragglers.windows import Run, alarms_per_hour, rates


def recorded(noise: float, windows: int = 60, pods: int = 6) -> Run:
    """Pods of one speed, with batches of their own."""
    chance = random.Random(3)

    def window() -> tuple[StepSums, float]:
        streams, kv_tokens = chance.randint(1, 8), chance.randint(500, 5000)
        sums = NO_STEPS
        for _ in range(5):
            prompt = chance.choice([0, 0, 256])
            seconds = 0.034 + 1e-4 * prompt + 1e-4 * streams + 1e-7 * kv_tokens
            sums += step(prompt, streams, seconds * chance.lognormvariate(0, noise))
        return sums.scaled(20.0), float(kv_tokens)

    return [[window() for _ in range(windows)] for _ in range(pods)]


def test_a_played_slow_pod_is_found_and_nobody_else() -> None:
    run = recorded(0.02)
    low, high = rates(run, 0.5, [10, 80], windows=6, seeds=6, within=20)
    assert (low.percent, low.found, low.wrong) == (10, 1.0, 0.0)
    assert low.median_windows is not None
    assert 6 <= low.median_windows <= 12
    assert (high.percent, high.found, high.median_windows, high.wrong) == (80, 0.0, None, 0.0)


def test_where_nobody_is_slow_there_is_no_alarm() -> None:
    found = alarms_per_hour(recorded(0.02), [10], windows=6, seeds=4, within=20, window_s=5.0)
    assert found == {10: 0.0}


def test_the_percentile_is_of_answers_within() -> None:
    answers = [Answer(float(n), n + 1.0, 0.001 * n) for n in range(1, 101)]
    assert tpot_p99_ms(answers, 0.0, math.inf) == 100.0
    assert tpot_p99_ms(answers, 0.0, 50.0) == 49.0
    assert tpot_p99_ms(answers, 200.0, math.inf) is None
