"""Whether a pod takes new streams. Pure state."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    SERVING = "serving"
    DRAINING = "draining"
    """Admits nothing new and finishes what runs; may be undone."""
    STOPPING = "stopping"
    """The same, for good: the process ends when the last stream has."""


class Lifecycle:
    def __init__(self) -> None:
        self.phase = Phase.SERVING

    @property
    def admits(self) -> bool:
        return self.phase is Phase.SERVING

    def ready(self, in_flight: int) -> bool:
        """A draining pod stays ready while it has streams: nobody may think them lost."""
        return self.admits or in_flight > 0

    def drain(self) -> None:
        if self.phase is Phase.SERVING:
            self.phase = Phase.DRAINING

    def undo_drain(self) -> None:
        if self.phase is Phase.DRAINING:
            self.phase = Phase.SERVING

    def stop(self) -> None:
        self.phase = Phase.STOPPING
