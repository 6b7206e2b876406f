"""What the gateway knows of one stream, enough to begin it again anywhere. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from tandem_runtime.protocol import GenerateEvent, GenerateRequest, PrefillTarget

ATTEMPTS: Final = 3
"""In a row without a token, before the stream is given up."""


@dataclass
class Journal:
    """Attempts are numbered by epoch; events of another epoch than the newest are dropped."""

    request: GenerateRequest
    output_ids: list[int] = field(default_factory=list)
    epoch: int = -1
    failures: int = 0
    """Attempts in a row that brought no token."""
    reason: str = ""
    """Why the last attempt failed."""
    avoid: set[str] = field(default_factory=set)
    """Uids of pods that failed this stream."""
    finished: bool = False

    @property
    def begun(self) -> bool:
        """Whether the client has seen a token: from then on a failure is a pause for it."""
        return bool(self.output_ids)

    def attempt(self, prefill: PrefillTarget | None) -> GenerateRequest:
        """The next attempt's request: everything generated so far is part of it."""
        self.epoch += 1
        return msgspec.structs.replace(
            self.request, epoch=self.epoch, output_ids=list(self.output_ids), prefill=prefill
        )

    def take(self, event: GenerateEvent) -> bool:
        """Whether the event belongs to the stream: it is of the newest attempt, and no error."""
        if event.epoch != self.epoch or event.error is not None:
            return False
        if event.token_ids:
            self.output_ids.extend(event.token_ids)
            self.failures = 0
        self.finished = event.finish_reason is not None
        return True

    def fail(self, pod_uid: str, reason: str) -> None:
        """The newest attempt failed, and this pod is to be avoided."""
        self.failures += 1
        self.reason = reason
        self.avoid.add(pod_uid)
