"""Why there is no plan."""

from __future__ import annotations


class PlanError(ValueError):
    """No fleet can do what is asked; the message is a sentence that says what could be."""
