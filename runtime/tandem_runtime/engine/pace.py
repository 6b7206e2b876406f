"""Steps as slow as those of a stated accelerator, so that several pods fit on a small machine.

The real engine runs a small model; each step then sleeps up to the time that the stated model would
take for the same batch on the stated accelerator (`roofline.replica`). Tokens mean nothing, while
queues, batches, caches and streams behave as they would there. Where the small model takes longer
than that, the real time stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.flight import Runner
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kv.layout import Payload
from tandem_runtime.roofline.replica import Replica

log = logging.getLogger(__name__)

_SLICE_S: Final = 0.004
"""Slept at a time: a process that is stopped or starved meanwhile loses that time, as one that
computes does."""
_OVERSLEEP_S: Final = 0.004
"""By which a slice may end late on a busy machine; that is made up for, more is time lost."""


def step_s(replica: Replica, batch: Batch) -> float:
    """What the replica takes for a batch; sequences of one row are decodes."""
    decodes = decode_context = prompt_tokens = prompt_context = 0
    pairs = 0.0
    for tokens, context in zip(batch.query_tokens, batch.context_tokens, strict=True):
        if tokens == 1:
            decodes += 1
            decode_context += context
        else:
            prompt_tokens += tokens
            prompt_context += context
            pairs += tokens * (context - tokens) + tokens * tokens / 2
    return replica.step_s(
        prompt_tokens=prompt_tokens,
        prompt_pairs=pairs,
        prompt_context_tokens=prompt_context,
        decodes=decodes,
        decode_context_tokens=decode_context,
    )


class PacedRunner:
    """Another runner at a stated pace. Implements `flight.Runner`.

    Copies of KV are not paced: they take what the small model's take.

    Args:
        own: what computes.
        replica: whose time a step takes.
        clock: monotonic, in seconds.
        sleep: for so many seconds.
    """

    overlaps = False

    def __init__(
        self,
        own: Runner,
        replica: Replica,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._own = own
        self._replica = replica
        self._clock = clock
        self._sleep = sleep

    @property
    def reads_beside(self) -> bool:
        """See `flight.Runner`."""
        return self._own.reads_beside

    def launch(self, batch: Batch) -> object:
        """See `flight.Runner`."""
        begun_s = self._clock()
        launched = self._own.launch(batch)
        return launched, step_s(self._replica, batch), self._clock() - begun_s

    def collect(self, launched: Any) -> list[SampledToken | None]:
        """See `flight.Runner`. Sleeps what is left of the step's time."""
        inner, lasts_s, spent_s = launched
        begun_s = self._clock()
        tokens = self._own.collect(inner)
        left_s = lasts_s - spent_s - (self._clock() - begun_s)
        while left_s > 0.0:
            slice_s = min(left_s, _SLICE_S)
            slept_from_s = self._clock()
            self._sleep(slice_s)
            left_s -= min(self._clock() - slept_from_s, slice_s + _OVERSLEEP_S)
        return tokens

    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """See `flight.Runner`."""
        return self._own.read_kv(block_ids, start, end)

    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        """See `flight.Runner`."""
        return self._own.read_beside(block_ids, start, end)

    def write_kv(
        self, block_ids: list[int], start: int, payload: Payload, layers: range | None = None
    ) -> None:
        """See `flight.Runner`."""
        self._own.write_kv(block_ids, start, payload, layers)

    def close(self) -> None:
        """See `flight.Runner`."""
        self._own.close()
