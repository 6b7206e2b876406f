"""A run with requests whose pods come, slow down and go as another run's did.

That is how the fluid mode is checked: the same pods, once under rates and once under requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.simulate.pool import Phase, ReplicaState
from tandem.simulate.run import Setup
from tandem.simulate.scalers import Fixed
from tandem.simulate.world import World
from tandem.traces.trace import Trace


@dataclass(frozen=True)
class PodEvent:
    """What happened to a pod, for a run of the same pods with requests."""

    at_s: float
    what: str
    """serves (again), slows, pauses, dies or leaves."""
    pod: str
    factor: float = 1.0


class PlayedWorld(World):
    """One pool, which begins with the pods named and goes on as the events say."""

    def __init__(
        self, setup: Setup, trace: Trace, pods: Sequence[str], events: Sequence[PodEvent]
    ) -> None:
        super().__init__(setup, trace, Fixed())
        self._played = events
        self._by_name = dict(zip(pods, self._decode.replicas, strict=True))
        for index, event in enumerate(events):
            self._push(event.at_s, "pod", index)

    def _handle(
        self, kind: str, subject: ReplicaState | int | None, version: int, now_s: float
    ) -> None:
        if kind == "pod":
            assert isinstance(subject, int)
            self._play(self._played[subject], now_s)
        else:
            super()._handle(kind, subject, version, now_s)

    def _play(self, event: PodEvent, now_s: float) -> None:
        replica = self._by_name.get(event.pod)
        if replica is None:
            replica = self._decode.create(now_s, startup_s=0.0)
            self._by_name[event.pod] = replica
        match event.what:
            case "serves" | "slows":
                if replica.engine.slow_down(event.factor, now_s):
                    self._wake_engine(replica, now_s)
                self._ready(replica, now_s)
            case "pauses":
                replica.phase = Phase.STARTING
            case "leaves":
                replica.phase = Phase.DRAINING
                if replica.engine.empty:
                    self._decode.end(replica, now_s)
            case _:
                # It is not replaced here: the replacement has events of its own.
                replica.phase = Phase.DRAINING
                self._fail(replica, now_s)
