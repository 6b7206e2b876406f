"""KV of preempted streams on the host, where copying it out and back is cheaper than recomputing.

The pages are canonical, one for each stream, pinned where the runner pins what it reads. Knows
neither tensors nor time: what a token costs is measured when the engine is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem_runtime.engine.flight import Runner
from tandem_runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class Rates:
    """Seconds a token."""

    compute_s: float
    """In a prefill chunk of the whole budget."""
    copy_s: float
    """Of its KV, one way."""

    def pays_out(self) -> bool:
        """Whether a stream that gives way is copied, to be copied back."""
        return 2 * self.copy_s < self.compute_s

    def pays_back(self, kept_tokens: int, cached_tokens: int) -> bool:
        """Whether a copy beats what the prefix cache has, and computing the rest."""
        return kept_tokens * self.copy_s < (kept_tokens - cached_tokens) * self.compute_s


class Swap:
    """What is kept, at most `capacity_bytes`."""

    def __init__(
        self, runner: Runner, rates: Rates, *, token_bytes: int, capacity_bytes: int
    ) -> None:
        self._runner = runner
        self._rates = rates
        self._token_bytes = token_bytes
        self._capacity_bytes = capacity_bytes
        self._kept: dict[Sequence, memoryview] = {}
        """Of waiting streams: their first tokens."""

    @property
    def held_bytes(self) -> int:
        return sum(page.nbytes for page in self._kept.values())

    def out(self, sequence: Sequence) -> None:
        """Copy what is computed of a sequence, if that pays and there is room."""
        tokens = sequence.computed_tokens
        room = self._capacity_bytes - self.held_bytes
        if 0 < tokens * self._token_bytes <= room and self._rates.pays_out():
            self._kept[sequence] = self._runner.read_kv(sequence.block_ids, 0, tokens)

    def pays_back(self, sequence: Sequence, cached_tokens: int) -> bool:
        """Whether a waiting sequence has a copy that is better than its cached tokens."""
        tokens = self._tokens(sequence)
        return tokens > 0 and self._rates.pays_back(tokens, cached_tokens)

    def back(self, sequence: Sequence) -> int:
        """Fill its new blocks; how many tokens are computed."""
        tokens = self._tokens(sequence)
        self._runner.write_kv(sequence.block_ids, 0, self._kept[sequence])
        return tokens

    def drop(self, sequence: Sequence) -> None:
        """Its copy, if there is one, is of no more use."""
        self._kept.pop(sequence, None)

    def _tokens(self, sequence: Sequence) -> int:
        page = self._kept.get(sequence)
        return page.nbytes // self._token_bytes if page is not None else 0

    def check_integrity(self, waiting: list[Sequence]) -> None:
        """Raise AssertionError unless all copies are of waiting streams, and few enough."""
        assert self._kept.keys() <= set(waiting), "KV is kept of a stream that does not wait"
        assert self.held_bytes <= self._capacity_bytes, "more KV is kept than allowed"
