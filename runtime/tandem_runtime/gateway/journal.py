"""What the gateway knows of one stream, enough to begin it again anywhere. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from tandem_runtime.protocol import GenerateEvent, GenerateRequest, HeldStream, PrefillTarget

ATTEMPTS: Final = 3
"""That fail in a row before the client has seen a token: then it had better ask again."""
RESUMES: Final = 5
"""That fail in a row since the last token: a lost stream costs a client more than a pause."""
ALL_ATTEMPTS: Final = 10
"""Of one stream, whatever progress they made."""
CRASHES: Final = 2
"""Pods that fail inside at one point of a stream before the stream is taken for the cause."""
REFUSED: Final = "bad_request"
"""The code of an attempt that its pod can never serve."""
_PAUSE_S: Final = 0.2
_TERM_EPOCHS: Final = 1 << 20
"""A gateway that takes a stream over begins at the next multiple: the one before, should it live,
never comes so far."""


@dataclass
class Journal:
    """Attempts are numbered by epoch; events of another than the one that counts are dropped."""

    request: GenerateRequest
    resumes: int = RESUMES
    """Attempts that may fail in a row since the last token."""
    output_ids: list[int] = field(default_factory=list)
    epoch: int = -1
    """Of the attempt that counts: the newest, unless that one is still to take the stream over."""
    attempts: int = 0
    """Those that take the stream over from one that runs are not counted."""
    failures: int = 0
    """Attempts in a row that failed, since the last token."""
    reason: str = ""
    """Why the last attempt failed."""
    code: str = ""
    """The same as `GenerateEvent.error_code`, or `unreachable`."""
    avoid: set[str] = field(default_factory=set)
    """Uids of pods that failed this stream."""
    waited_s: float = 0.0
    """How long the stream has waited for pods, of all its attempts."""
    finished: bool = False
    _crashed: dict[int, set[str]] = field(default_factory=dict)
    """Uids of pods that failed inside, by the number of tokens that the stream had then."""
    _epochs: int = 0
    """Given out."""

    @classmethod
    def of(cls, held: HeldStream, resumes: int = RESUMES) -> Journal:
        """Of a stream that another gateway began."""
        journal = cls(held.request, resumes, list(held.so_far.token_ids))
        journal.finished = held.so_far.finish_reason is not None
        journal._epochs = (held.request.epoch // _TERM_EPOCHS + 1) * _TERM_EPOCHS
        return journal

    @property
    def begun(self) -> bool:
        """Whether the client has seen a token: from then on a failure is a pause for it."""
        return bool(self.output_ids)

    @property
    def exhausted(self) -> bool:
        """Whether no further attempt is to be made."""
        in_a_row = self.resumes if self.begun else ATTEMPTS
        return self.failures >= in_a_row or self.attempts >= ALL_ATTEMPTS

    @property
    def crashes_pods(self) -> bool:
        """Whether the stream itself seems to be what its pods fail of: another one would too."""
        return len(self._crashed.get(len(self.output_ids), ())) >= CRASHES

    @property
    def pause_s(self) -> float:
        """Between a failure and the next attempt: doubled with each failure in a row."""
        return _PAUSE_S * 2.0 ** (self.failures - 1)

    def attempt(
        self, prefill: PrefillTarget | None, holder: PrefillTarget | None = None
    ) -> GenerateRequest:
        """The next attempt's request: everything generated so far is part of it."""
        self.attempts += 1
        self.epoch = self._next_epoch()
        return msgspec.structs.replace(
            self.request,
            epoch=self.epoch,
            output_ids=list(self.output_ids),
            prefill=prefill,
            holder=holder,
        )

    def takeover(self, source: PrefillTarget) -> GenerateRequest:
        """Asks another pod to go on with the stream, which runs on meanwhile."""
        return msgspec.structs.replace(
            self.request,
            epoch=self._next_epoch(),
            output_ids=list(self.output_ids),
            prefill=None,
            holder=None,
            take_from=source,
        )

    def switch(self, ask: GenerateRequest, event: GenerateEvent) -> GenerateEvent | None:
        """From this `taken_over` event on, the attempt `ask` counts.

        Returns:
            The event with the tokens that have not come yet, to be taken; None when the pod before
            has gone on with the stream, which is then its still.
        """
        seen = tuple(self.output_ids[len(ask.output_ids) :])
        if event.token_ids[: len(seen)] != seen:
            return None
        self.epoch = ask.epoch
        return msgspec.structs.replace(
            event,
            token_ids=event.token_ids[len(seen) :],
            logprobs=event.logprobs[len(seen) :],
            top_logprobs=event.top_logprobs[len(seen) :],
        )

    def _next_epoch(self) -> int:
        self._epochs += 1
        return self._epochs - 1

    def take(self, event: GenerateEvent) -> bool:
        """Whether the event belongs to the stream: it is of the newest attempt, and no error."""
        if event.epoch != self.epoch or event.error is not None:
            return False
        if event.token_ids:
            self.output_ids.extend(event.token_ids)
            self.failures = 0
        self.finished = event.finish_reason is not None
        return True

    def fail(self, pod_uid: str, reason: str, code: str = "unreachable") -> None:
        """The newest attempt failed, and this pod is to be avoided."""
        self.failures += 1
        self.reason = reason
        self.code = code
        self.avoid.add(pod_uid)
        if code == "internal":
            self._crashed.setdefault(len(self.output_ids), set()).add(pod_uid)
