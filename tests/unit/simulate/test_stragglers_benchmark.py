"""The straggler benchmark's parts: recorded windows that are played again, percentiles."""

from __future__ import annotations

import math
import random

from tandem_operator.plan.scaling.window import NO_STEPS, StepSums, step

from benchmarks.stragglers.load import Answer, tpot_p99_ms
from benchmarks.stragglers.windows import Run, rates


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
    found = rates(recorded(0.02), 0.5, 10, windows=6, seeds=8, window_s=5.0, within=30)
    assert (found.found, found.wrong, found.alarms_per_hour) == (1.0, 0.0, 0.0)
    assert found.median_windows is not None
    assert 6 <= found.median_windows <= 12


def test_what_is_not_slow_enough_is_not_found() -> None:
    found = rates(recorded(0.02), 0.1, 40, windows=6, seeds=4, window_s=5.0, within=30)
    assert (found.found, found.median_windows, found.wrong) == (0.0, None, 0.0)


def test_the_percentile_is_of_answers_within() -> None:
    answers = [Answer(float(n), n + 1.0, 0.001 * n) for n in range(1, 101)]
    assert tpot_p99_ms(answers, 0.0, math.inf) == 100.0
    assert tpot_p99_ms(answers, 0.0, 50.0) == 49.0
    assert tpot_p99_ms(answers, 200.0, math.inf) is None
