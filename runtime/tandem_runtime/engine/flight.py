"""What computes the engine's steps, as the engine sees it, and a step that is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tandem_runtime.device_report import ProbeSums
from tandem_runtime.engine.batch import Batch, Work
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kv.layout import Payload


class Runner(Protocol):
    """Computes steps, in order, and owns the memory of the KV cache."""

    overlaps: bool
    """Whether `launch` returns before the step is computed, so that two can be under way."""

    @property
    def reads_beside(self) -> bool:
        """Whether `read_beside` ever gives anything."""

    def launch(self, batch: Batch) -> object:
        """Begin to compute every row and store its KV; what `collect` takes."""

    def collect(self, launched: Any) -> list[SampledToken | None]:
        """Wait for a step; one token for each of its samples, in order.

        None where the model's output is not finite.
        """

    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """Tokens [start, end) of these blocks in canonical form; a copy."""

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        """The same from another thread, while steps are computed; None where that cannot be. The
        caller finds out whether the blocks were written meanwhile."""

    def write_kv(
        self, block_ids: list[int], start: int, payload: Payload, layers: range | None = None
    ) -> None:
        """The inverse of `read_kv`, from token `start` on. With `layers` the payload is that of
        these alone; the others come in further calls."""

    def close(self) -> None:
        """End what computes beside this process. Nothing is called after it."""


class Probe(Protocol):
    """A micro-benchmark of the device, at start and between steps."""

    sums: ProbeSums
    """Of all runs between steps."""
    copy_bytes_per_s: float
    """Of the self-test at start; likewise the next."""
    matmul_flop_per_s: float
    failing: str | None
    """A sentence, where the self-test was far below what such a device does."""

    def run_if_due(self) -> None:
        """Run once, unless it ran less than a second ago."""


@dataclass(frozen=True)
class Flight:
    """A step that was launched and not collected yet."""

    launched: object
    works: list[Work]
    rows: int
