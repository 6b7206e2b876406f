"""What a replica can do, learned from its steps.

A step with p prompt tokens and s streams takes a + b p + c s seconds: a for reading the weights, b
and c for the work of each token. Least squares over past steps finds the three; no profile is
needed, and a slower GPU or a longer context shows within minutes.

While all steps were alike, a cannot be told from c s: a small prior on a = 0 then takes the
pessimistic side, capacity in proportion to the time that is left. Later on, what new steps leave
open stays as it was.
"""

from __future__ import annotations

from tandem_operator.plan.costs import costs_of
from tandem_operator.plan.scaling.window import Load, StepCost, StepSums

MOST_STEPS = 20_000.0
"""Weight of all past steps together: about five minutes of a busy engine."""
FEWEST_STEPS = 20.0
"""With fewer nothing is said."""
PRIOR_STEPS = 20.0
"""Weight of what was known of a before; at first that it is 0."""
ALIKE = 1e-4
"""Weight of what was known before, as a share of the data's: two kinds of work that always come in
one proportion keep their shares of the cost, instead of one becoming dear and the other free by
chance."""
LEAST_SHARE = 0.05
"""Of the time per token that a stream's batch is left, however dear its steps are."""


def remember(past: StepSums, new: StepSums) -> StepSums:
    """Both, older steps counted less."""
    both = past + new
    return both.scaled(MOST_STEPS / both.steps) if both.steps > MOST_STEPS else both


def fit(sums: StepSums, before: StepCost | None) -> StepCost | None:
    """The cost of steps; what they leave open stays as `before`. None while too few were seen."""
    if sums.steps < FEWEST_STEPS or sums.seconds <= 0.0:
        return None
    known = (before.base_s, before.prompt_s, before.stream_s) if before else (0.0, 0.0, 0.0)
    matrix = (
        (sums.steps + PRIOR_STEPS, sums.prompt, sums.streams),
        (sums.prompt, sums.prompt_prompt, sums.prompt_streams),
        (sums.streams, sums.prompt_streams, sums.streams_streams),
    )
    right = (
        sums.seconds + PRIOR_STEPS * known[0],
        sums.seconds_prompt,
        sums.seconds_streams,
    )
    found = costs_of(matrix, right, known, ALIKE)
    return None if found is None else StepCost(*found)


def prompt_rate(cost: StepCost, sums: StepSums, load: Load) -> float:
    """Prompt tokens per second of a replica that computes nothing else; 0: not known."""
    chunk = load.step_tokens or (sums.prompt_prompt / sums.prompt if sums.prompt else 0.0)
    seconds = cost.base_s + cost.prompt_s * chunk
    return chunk / seconds if seconds > 0.0 else 0.0


def streams_at(cost: StepCost, sums: StepSums, load: Load, tpot_s: float) -> float:
    """Streams of a replica whose steps take `tpot_s`, as far as its KV cache holds them; 0: not
    known."""
    if sums.streams <= 0.0:
        return 0.0
    # A pool that also computes prompts does so in the same steps, in proportion to its streams.
    stream_s = cost.stream_s + cost.prompt_s * sums.prompt / sums.streams
    left_s = max(tpot_s - cost.base_s, LEAST_SHARE * tpot_s)
    limits = [left_s / stream_s] if stream_s > 0.0 else []
    if load.max_streams > 0.0:
        limits.append(load.max_streams)
    if load.kv_capacity_tokens > 0.0 and load.kv_tokens > 0.0 and load.streams > 0.0:
        limits.append(load.kv_capacity_tokens * load.streams / load.kv_tokens)
    # Steps that cost the same with any batch seen so far: the largest one is what is known.
    return max(1.0, min(limits) if limits else 2.0 * sums.streams_streams / sums.streams)


def step_s(cost: StepCost, streams: float) -> float:
    """A step of so many streams and no prompt."""
    return max(cost.base_s + cost.stream_s * streams, 1e-6)
