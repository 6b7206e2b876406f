"""Stop strings: the text ends before the first one, wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    text: str
    """Safe to send: no stop string can begin in it any more."""
    stopped: bool


class StopStrings:
    """Holds back text while it may still become a stop string.

    The match that ends first wins; of those, the one that starts first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> StopResult:
        if not self._stops:
            return StopResult(text, False)
        buffer = self._held + text
        matches = [(at + len(s), at) for s in self._stops if (at := buffer.find(s)) >= 0]
        if matches:
            _, start = min(matches)
            self._held = ""
            return StopResult(buffer[:start], True)
        keep = max(overlap(buffer, stop) for stop in self._stops)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return StopResult(buffer[:cut], False)

    def flush(self) -> str:
        """The stream ended: what was held is text after all."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
