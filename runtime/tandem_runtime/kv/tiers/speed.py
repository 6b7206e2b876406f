"""What a page takes to load from somewhere, as measured. Pure."""

from __future__ import annotations

from typing import Final

_NEW_WEIGHT: Final = 0.2
"""Of the newest measurement."""


class Speed:
    """Of one place."""

    def __init__(self) -> None:
        self.page_s = 0.0
        """0: nothing was measured yet. Too low at first: a beginning that was slow, such as a
        connection, is no reason to give a place up."""
        self._weight = 0.0

    @property
    def known(self) -> bool:
        return self.page_s > 0.0

    def measured(self, page_s: float) -> None:
        """A page took so long."""
        self.page_s += _NEW_WEIGHT * (page_s - self.page_s)
        self._weight += _NEW_WEIGHT * (1.0 - self._weight)

    @property
    def likely_s(self) -> float:
        """Without that bias. Only where it is known."""
        return self.page_s / self._weight
