"""What goes to the pods with an answer's streams, so that another gateway can go on with it."""

from __future__ import annotations

import msgspec


class AnswerJournal(msgspec.Struct, frozen=True, omit_defaults=True):
    """Beside the streams' requests, which their pods have. It does not change."""

    id: str
    created: int
    model: str
    """As the client named it."""
    seed: int
    """Of the first choice of each prompt; the others' follow from it."""
    prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    choices: int = 1
    """For each prompt."""
    chat: bool = False
    tools: bool = False
    """Whether the model was told of tools."""
    stop: tuple[str, ...] = ()
    echo: str = ""
    """What the choice's text begins with."""
    include_usage: bool = False
    traced: bool = False

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> AnswerJournal:
        """Raises `msgspec.MsgspecError` for that of another version."""
        return msgspec.json.decode(data, type=cls)
