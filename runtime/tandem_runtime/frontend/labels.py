"""Labels of metrics whose values clients choose: a bounded number of them."""

from __future__ import annotations

from typing import Final

OTHER: Final = "other"


class BoundedLabels:
    """The first `most` values are told apart, the others are `other`; a value keeps its label for
    as long as it is remembered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, None] = {}

    def of(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known[value] = None
        return value

    def keep(self, values: set[str]) -> set[str]:
        """Forget all values but these; what was forgotten."""
        gone = self._known.keys() - values
        for value in gone:
            del self._known[value]
        return set(gone)
