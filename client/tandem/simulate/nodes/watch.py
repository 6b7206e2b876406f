"""Looking for stragglers: the operator's own comparison, on windows made from the load's rates."""

from __future__ import annotations

from collections.abc import Container, Mapping
from random import Random
from typing import Final

from tandem_operator.api.node_health import NodeHealthPolicySpec
from tandem_operator.plan.nodes.stragglers import Measured, Memory, observe, stragglers
from tandem_operator.plan.nodes.view import Straggler
from tandem_operator.plan.scaling.window import NO_STEPS, step

from tandem.simulate.nodes.flow import Pace
from tandem.simulate.nodes.pods import Pool

NOISE: Final = 0.03
"""Standard deviation of a window's step time."""
WANDERS: Final = 0.2
"""Of the streams of a pod in a window, as a share."""
PATIENCE: Final = 40
"""Windows after which only every twentieth is made: who was not found by then hardly will be."""


class Watch:
    """Measures pools that have a slow pod. Others are not: alarms in them are not simulated."""

    def __init__(self, pace: Pace, policy: NodeHealthPolicySpec, chance: Random) -> None:
        self._pace = pace
        self._wanted = policy.signals.stragglers
        self._chance = chance
        self._memories: dict[str, Memory] = {}
        self._windows: dict[str, int] = {}

    @property
    def window_s(self) -> float:
        return float(self._wanted.window_seconds) if self._wanted else 0.0

    def begin(self, pool: Pool, found: Container[str]) -> bool:
        """Whether the pool has to be measured from now on, and was not before."""
        if self._wanted is None or pool.name in self._windows or not _hidden(pool, found):
            return False
        self._windows[pool.name], self._memories[pool.name] = 0, {}
        return True

    def next_s(self, pool: Pool, found: Container[str]) -> float | None:
        """When to measure it again; None: never, until something is slow there."""
        if not _hidden(pool, found):
            self._windows.pop(pool.name, None)
            self._memories.pop(pool.name, None)
            return None
        return self.window_s * (20 if self._windows[pool.name] > PATIENCE else 1)

    def window(self, pool: Pool, nodes: Mapping[str, str]) -> tuple[Straggler, ...]:
        """One more window of it."""
        if self._wanted is None or not pool.serving:
            return ()
        self._windows[pool.name] += 1
        per_pod = self._pace.demand.requests_per_s / sum(1 / f for f in pool.serving.values())
        streams = self._pace.streams_at(per_pod)
        measured = {
            uid: self._measured(pool, uid, nodes[uid], streams, factor)
            for uid, factor in sorted(pool.serving.items())
        }
        wanted = self._wanted
        memory = observe(self._memories[pool.name], measured.values(), wanted.windows)
        self._memories[pool.name] = memory
        return stragglers(memory, measured, wanted.percent, wanted.windows)

    def _measured(self, pool: Pool, uid: str, node: str, streams: float, factor: float) -> Measured:
        pace, chance = self._pace, self._chance
        count = max(1, round(min(streams * chance.lognormvariate(0, WANDERS), pace.most_streams)))
        slower = factor * chance.lognormvariate(0, NOISE)
        seconds = pace.step_s(count) * slower
        prompt = round(count * pace.demand.prompt_tokens / pace.demand.output_tokens)
        sums = NO_STEPS + step(prompt, count, seconds)
        kv = count * (pace.demand.prompt_tokens + pace.demand.output_tokens)
        return Measured(uid, uid, node, pool.name, sums.scaled(self.window_s / seconds), kv)


def _hidden(pool: Pool, found: Container[str]) -> bool:
    return any(factor > 1.0 and uid not in found for uid, factor in pool.serving.items())
