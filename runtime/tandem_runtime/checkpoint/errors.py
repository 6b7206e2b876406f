"""Why a model cannot be served: a reason for machines, a sentence for people."""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "UnsupportedArchitecture",
    "WeightsMissing",
    "WeightsCorrupt",
    "UnsupportedSource",
    "BadConfig",
    "ContextTooLong",
    "SourceUnauthorized",
    "SourceUnreachable",
]


class ModelError(Exception):
    """A model that cannot be served, found while looking at its source, header or weights."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message
