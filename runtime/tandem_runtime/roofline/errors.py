"""Why there is no figure."""

from __future__ import annotations


class RooflineError(ValueError):
    """What is asked is unknown or does not fit; the message is a sentence that says what could."""
