"""Turns a batch of index lists into tensors, runs the model, samples.

On a GPU nothing waits between a step's launch and its `collect`: integers go there in one copy from
pinned memory, the tokens that the step before chose stay there for the rows that need them, and
what the host wants to know is copied to pinned memory, after which an event is recorded.

On a CPU of several cores a team of threads (kernels/team.py) computes each operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem_runtime import kernels
from tandem_runtime.engine.batch import Batch
from tandem_runtime.engine.flight import Probe
from tandem_runtime.engine.graphs import DecodeGraphs, known_ids
from tandem_runtime.engine.recorded import RecordedSteps
from tandem_runtime.engine.sampler import Choice, choose
from tandem_runtime.engine.sequence import SampledToken
from tandem_runtime.kernels.attention_plan import GpuWork, Step
from tandem_runtime.kernels.team import Team
from tandem_runtime.kv.cache import KvCache
from tandem_runtime.kv.layout import Payload
from tandem_runtime.model.decoder import Decoder


@dataclass(frozen=True)
class Launched:
    """A step that the device has been given."""

    choice: Choice | None
    """None: it samples nothing, or another rank does."""
    ended: torch.cuda.Event | None
    """None: on the CPU it has ended."""


class TorchRunner:
    """A model and its cache on one device. Implements `flight.Runner`.

    Args:
        model: what computes.
        cache: where KV is.
        max_running: rows that a step samples at most.
        overlaps: whether two steps may be under way; None: on a GPU.
        threads: that compute a step together, on the CPU.
        probe: of the same device, for the engine.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KvCache,
        max_running: int,
        *,
        overlaps: bool | None = None,
        threads: int = 1,
        probe: Probe | None = None,
    ) -> None:
        self.probe = probe
        self._model = model
        self._cache = cache
        self._device = cache.data.device
        on_gpu = self._device.type == "cuda"
        self.overlaps = on_gpu if overlaps is None else overlaps
        self.reads_beside = True
        self._chosen = torch.zeros(max_running, dtype=torch.int64, device=self._device)
        """By the newest step; sample by sample."""
        self._graphs: DecodeGraphs | RecordedSteps | None = None
        self._team = Team(1 if on_gpu else threads)
        self._transfers = self._stream()
        self._lending = self._stream()
        """Apart from the transfers, for which the engine waits."""

    def capture_graphs(self) -> None:
        """Decode steps are replayed from here on, where they can be."""
        if self._device.type == "cuda":
            self._graphs = DecodeGraphs(self._model, self._cache, self._chosen)
        elif self._model.recordable and self._cache.data.dtype == self._model.dtype:
            self._graphs = RecordedSteps(self._model, self._cache, self._chosen)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """See `flight.Runner`."""
        self._cache.begin(batch.slots)
        choice = self._choose(batch)
        if batch.samples and self.overlaps:
            if choice is not None:
                self._chosen[: len(batch.samples)] = choice.ids
            self._model.ranks.share(self._chosen)
        return Launched(choice, self._mark())

    def _choose(self, batch: Batch) -> Choice | None:
        step = Step(
            batch.query_tokens, batch.context_tokens, batch.block_tables, self._cache.block_tokens
        )
        with self._team.step():
            logits = self._graphs.replay(batch, step) if self._graphs is not None else None
            if logits is None:
                logits = self._forward(batch, step)
        if not batch.samples or self._model.ranks.rank > 0:  # rank 0 alone decides
            return None
        return choose(logits[: len(batch.samples)], batch.samples)

    def _forward(self, batch: Batch, step: Step) -> Tensor:
        config = self._model.config
        columns = [
            batch.token_ids,
            batch.positions,
            batch.slots,
            [sample.row for sample in batch.samples],
        ]
        head = np.array([value for column in columns for value in column], np.int32)
        work = kernels.plan_attention(
            step,
            heads=config.heads,
            kv_heads=config.kv_heads,
            device=self._device,
            dtype=self._model.dtype,
            head=head,
        )
        ints = work.ints[: len(head)] if isinstance(work, GpuWork) else torch.from_numpy(head)
        token_ids, positions, slots, logit_rows = torch.split(
            ints.long(), [len(column) for column in columns]
        )
        if self.overlaps:
            token_ids = known_ids(token_ids, self._chosen)
        pool = self._cache.data
        return self._model.forward(token_ids, positions, slots, pool, work, logit_rows)

    def collect(self, launched: Launched) -> list[SampledToken | None]:
        """See `flight.Runner`."""
        if launched.ended is not None:
            launched.ended.synchronize()
        return launched.choice.tokens() if launched.choice is not None else []

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        # Blocking: who waits for a step leaves the processor to others.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @torch.inference_mode()
    def read_kv(self, block_ids: list[int], start: int, end: int) -> memoryview:
        """Canonical bytes of tokens [start, end)."""
        with self._beside_steps(self._transfers):
            return self._cache.read(block_ids, start, end)

    @torch.inference_mode()
    def read_beside(self, block_ids: list[int], start: int, end: int) -> memoryview | None:
        """See `flight.Runner`."""
        with self._beside_steps(self._lending):
            return self._cache.read(block_ids, start, end)

    @torch.inference_mode()
    def write_kv(
        self, block_ids: list[int], start: int, payload: Payload, layers: range | None = None
    ) -> None:
        """Store canonical bytes from token `start` on."""
        with self._beside_steps(self._transfers):
            self._cache.write(block_ids, start, payload, layers)

    def _stream(self) -> torch.cuda.Stream | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @staticmethod
    @contextmanager
    def _beside_steps(stream: torch.cuda.Stream | None) -> Iterator[None]:
        """A transfer does not wait for the step in flight, which touches none of its blocks."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def close(self) -> None:
        """Memory goes with the process."""
        self._team.close()
