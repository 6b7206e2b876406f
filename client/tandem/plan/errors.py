"""Why there is no plan."""

from __future__ import annotations

from tandem_runtime.roofline.errors import RooflineError


class PlanError(RooflineError):
    """No fleet can do what is asked; the message is a sentence that says what could be."""
