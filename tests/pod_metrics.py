"""What a pod's metrics say, for tests with real pods."""

from __future__ import annotations

import httpx


def metric(url: str, name: str, *labels: str) -> float:
    """The sum over samples with these labels."""
    total = 0.0
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if line.startswith(name) and all(label in line for label in labels):
            total += float(line.rpartition(" ")[2])
    return total
