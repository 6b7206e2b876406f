"""What an engine says of itself, for metrics and for the pod's state."""

from __future__ import annotations

from dataclasses import dataclass

from tandem_runtime.engine.scheduler import Scheduler
from tandem_runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class EngineStats:
    """The engine now (streams and blocks) and since it started (token counts)."""

    running: int
    waiting: int
    receiving: int
    held: int
    """Exports whose KV is kept until `release`, and frozen streams."""
    total_blocks: int
    held_blocks: int
    """In use by streams."""
    cached_blocks: int
    """Free, and findable by the prefix cache."""
    preemptions: int
    prompt_tokens: int
    """Of streams admitted to be computed here."""
    cached_tokens: int
    """Of those, found in the prefix cache."""
    generated_tokens: int
    arrivals: int = 0
    """Streams taken in since it started; not those, or tries for them, that ran on another engine:
    they arrived there."""
    queued_tokens: int = 0
    """Known tokens of waiting streams; how many of them are cached is found out on admission."""

    @property
    def kv_usage(self) -> float:
        """Share of blocks in use by streams, 0..1."""
        return self.held_blocks / self.total_blocks


@dataclass
class Totals:
    """What the engine counts as it goes; see `EngineStats`."""

    arrivals: int = 0
    """Of every kind."""
    taken_over: int = 0
    """Of those, the ones that another engine decodes."""
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    def count(self, admitted: Sequence) -> None:
        """A stream that is computed here for the first time."""
        self.prompt_tokens += admitted.prompt_tokens
        self.cached_tokens += admitted.cached_tokens


def engine_stats(scheduler: Scheduler, totals: Totals) -> EngineStats:
    """The engine as it stands between two steps."""
    queued = [*scheduler.waiting, *scheduler.fetching]
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(queued),
        receiving=len(scheduler.receiving),
        held=len(scheduler.held) + len(scheduler.frozen),
        total_blocks=scheduler.pool.total_blocks,
        held_blocks=scheduler.pool.held_blocks,
        cached_blocks=scheduler.pool.cached_blocks,
        preemptions=totals.preemptions,
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
        generated_tokens=totals.generated_tokens,
        arrivals=totals.arrivals - totals.taken_over,
        queued_tokens=sum(len(sequence.token_ids) for sequence in queued),
    )
