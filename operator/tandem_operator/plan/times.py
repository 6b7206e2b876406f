"""RFC 3339 <-> seconds since the epoch: statuses carry text, plans compare numbers."""

from __future__ import annotations

from datetime import UTC, datetime


def to_unix_s(text: str) -> float:
    """Seconds since the epoch of a Kubernetes timestamp."""
    return datetime.fromisoformat(text).timestamp()


def to_text(unix_s: float) -> str:
    """A Kubernetes timestamp, in whole seconds."""
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
