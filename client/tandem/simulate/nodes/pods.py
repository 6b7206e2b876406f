"""Pods of fleets of one pool each: a whole node a pod, replaced as the operator replaces them.

A pod that has to leave stays until another one is Ready in its place (no pool is taken below its
size); one that is not Ready is replaced at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from tandem_operator.plan.nodes.view import PlacedPod

from tandem.simulate.nodes.flow import Flow
from tandem.simulate.played import PodEvent

GPU: Final = "nvidia.com/gpu"
GRACE_S: Final = 630


@dataclass
class Pool:
    """Pods that serve the same, and their load."""

    name: str
    size: int
    flow: Flow
    pods: dict[str, PlacedPod] = field(default_factory=dict)
    """By uid; those without a node have ''."""
    serving: dict[str, float] = field(default_factory=dict)
    """How much slower than it should be each is that takes load."""
    course: list[PodEvent] = field(default_factory=list)
    made: int = 0
    under_since_s: float | None = None
    under_s: float = 0.0
    """In all, with fewer than its size serving."""
    fewest: int = 0
    began_to_leave: set[str] = field(default_factory=set)

    def make(self, gpus: int) -> PlacedPod:
        """A pod without a node."""
        uid = f"{self.name}-{self.made}"
        self.made += 1
        self.pods[uid] = PlacedPod(
            namespace="simulated",
            name=uid,
            uid=uid,
            node="",
            runtime=True,
            fleet=self.name,
            pool=self.name,
            ready=False,
            terminating=False,
            grace_s=GRACE_S,
            accelerators={GPU: gpus},
        )
        return self.pods[uid]

    def change(self, uid: str, **changes: object) -> PlacedPod:
        """A pod as it is now."""
        self.pods[uid] = replace(self.pods[uid], **changes)  # type: ignore[arg-type]
        return self.pods[uid]

    def serve(self, uid: str, factor: float, now_s: float) -> None:
        """It takes load, at that speed."""
        self.flow.advance(now_s, self.serving)
        what = "slows" if uid in self.serving else "serves"
        self.serving[uid] = factor
        self._note(what, uid, now_s, factor)

    def stop(self, uid: str, what: str, now_s: float) -> bool:
        """It takes no more load, because it pauses, dies or leaves. False: it did not."""
        if uid not in self.serving:
            return False
        self.flow.advance(now_s, self.serving)
        if what == "dies":
            self.flow.crash(self.serving)
        del self.serving[uid]
        self._note(what, uid, now_s)
        return True

    def _note(self, what: str, uid: str, now_s: float, factor: float = 1.0) -> None:
        self.course.append(PodEvent(now_s, what, uid, factor))
        count = len(self.serving)
        self.fewest = min(self.fewest, count)
        if count < self.size and self.under_since_s is None:
            self.under_since_s = now_s
        elif count >= self.size and self.under_since_s is not None:
            self.under_s += now_s - self.under_since_s
            self.under_since_s = None

    def end(self, now_s: float) -> None:
        """The run is over."""
        self.flow.advance(now_s, self.serving)
        if self.under_since_s is not None:
            self.under_s += now_s - self.under_since_s

    @property
    def live(self) -> list[PlacedPod]:
        """That are there to stay, as far as the API says."""
        return [p for p in self.pods.values() if not p.terminating and not p.draining]

    def may_lose(self, uid: str) -> bool:
        """Whether a budget without unavailable pods allows it."""
        return uid not in self.serving or len(self.serving) - 1 >= self.size


def emptiest(pool: Pool, free: Iterable[str], racks: dict[str, int]) -> str | None:
    """Of the free nodes the first one in a rack with the fewest of the pool's pods."""
    taken = Counter(racks[p.node] for p in pool.pods.values() if p.node)
    return min(free, key=lambda node: taken[racks[node]], default=None)
