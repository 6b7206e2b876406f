"""What the law remembers of a pool: numbers only, a few hundred bytes, kept in the Pool's status.

Times are Unix seconds, so that another process may go on from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem_operator.plan.scaling.window import NO_STEPS, StepCost, StepSums

CLASSES = 3
"""Of past looks: load that fell, that stayed, that rose."""
GROWTH_BINS = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)
"""Growth factors; what grew less than the first counts as the first."""
NOTHING_SEEN = ((0.0,) * len(GROWTH_BINS),) * CLASSES


@dataclass(frozen=True)
class Sample:
    """The pool's need at some time, in replicas."""

    at_s: float
    need: float


@dataclass(frozen=True)
class ScalingState:
    """Of one pool; the initial value is that of a pool never looked at."""

    steps: StepSums = NO_STEPS
    """Past steps, older ones counted less."""
    cost: StepCost | None = None
    """Of a step, as last learned."""
    startup_s: float | None = None
    """As measured, smoothed."""
    arrivals: tuple[tuple[float, float], ...] = ()
    """(seconds, work) of the last windows, oldest first."""
    held: tuple[Sample, ...] = ()
    """Needs that later ones have not exceeded: strictly falling, oldest first."""
    past: tuple[Sample, ...] = ()
    """The largest need of each eighth of a start-up time, from which growth is learned."""
    growth: tuple[tuple[float, ...], ...] = NOTHING_SEEN
    """How often need grew by each of GROWTH_BINS over a start-up time, weighted by need, for each
    class of past looks."""
    trim: float = 1.0
    """Share of the learned capacity with which the target was kept: feedback's correction."""
    trimmed_s: float | None = None
    """When feedback last looked."""
    ready: int = -1
    ready_since_s: float | None = None
    """When the number of ready replicas last changed."""
    last_in_s: float | None = None
    last_load_s: float | None = None
    """When there last was any request."""
