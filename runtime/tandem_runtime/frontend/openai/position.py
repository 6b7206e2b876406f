"""How much of an answer its client has: the `id:` of server-sent events.

One number for each choice, of the tokens whose text is out, and an `f` behind it once its finish
is: `41,38f`. `end`: nothing but the end of the answer is left. The text that is out after a number
of tokens is a function of the tokens, so nothing else has to be known of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from tandem_runtime.frontend.errors import BadRequest
from tandem_runtime.frontend.generation import Piece

MAX_CHOICES: Final = 16
"""Answers of more choices are not resumed: each event would name all of them."""
_END: Final = "end"
_CHOICE: Final = re.compile(r"([0-9]{1,10})(f?)")


@dataclass
class Sent:
    """Of one choice."""

    tokens: int = 0
    finished: bool = False


@dataclass
class Position:
    sent: list[Sent]
    ended: bool = field(default=False)
    """The last chunk is out, too."""

    @classmethod
    def start(cls, choices: int) -> Position:
        return cls([Sent() for _ in range(choices)])

    @classmethod
    def parse(cls, event_id: str, choices: int) -> Position:
        """Empty: the start. Raises `BadRequest`."""
        if not event_id:
            return cls.start(choices)
        if event_id == _END:
            return cls([Sent(0, finished=True) for _ in range(choices)], ended=True)
        parts = [_CHOICE.fullmatch(part) for part in event_id.split(",")]
        sent = [Sent(int(part[1]), part[2] == "f") for part in parts if part is not None]
        if len(sent) != choices or len(parts) != choices:
            raise BadRequest(
                "Last-Event-ID is none of this stream's: send the id of the last event that came, "
                "or leave it out to have the whole stream again."
            )
        return cls(sent)

    def __str__(self) -> str:
        if self.ended:
            return _END
        return ",".join(f"{one.tokens}{'f' * one.finished}" for one in self.sent)

    @property
    def unfinished(self) -> int:
        """Choices."""
        return sum(not one.finished for one in self.sent)

    def take(self, index: int, piece: Piece) -> bool:
        """Whether the client does not have this piece yet; it counts as sent then."""
        sent = self.sent[index]
        if piece.tokens <= sent.tokens and piece.finish_reason is None:
            return False
        sent.tokens = piece.tokens
        sent.finished = piece.finish_reason is not None
        return True
