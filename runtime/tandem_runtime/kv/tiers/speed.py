"""What a page takes to load from somewhere, as measured. Pure."""

from __future__ import annotations

from typing import Final

_NEW_WEIGHT: Final = 0.2
"""Of the newest measurement."""


class Speed:
    """Of one place."""

    def __init__(self) -> None:
        self.page_s = 0.0
        """0: nothing was measured yet."""

    @property
    def known(self) -> bool:
        return self.page_s > 0.0

    def measured(self, page_s: float) -> None:
        """A page took so long."""
        self.page_s += _NEW_WEIGHT * (page_s - self.page_s)
