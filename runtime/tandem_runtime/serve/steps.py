"""The sums over an engine's steps that `protocol.StepSums` reports."""

from __future__ import annotations

from tandem_runtime.protocol import StepSums


class StepTimes:
    """Adds steps up; one thread adds, any thread reads."""

    def __init__(self) -> None:
        self.sums = StepSums()

    def add(self, prompt: int, streams: int, seconds: float) -> None:
        """One step: its prompt tokens, the streams that got their next token, how long it took."""
        past = self.sums
        self.sums = StepSums(
            past.steps + 1,
            past.seconds + seconds,
            past.prompt + prompt,
            past.streams + streams,
            past.prompt_prompt + prompt * prompt,
            past.prompt_streams + prompt * streams,
            past.streams_streams + streams * streams,
            past.seconds_prompt + seconds * prompt,
            past.seconds_streams + seconds * streams,
        )
