"""Counts of NVIDIA's error codes: what counts is when one rises.

The first count that is seen is history, and so is one that fell: its source started anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

Counts = Mapping[int, int]
Rises = Mapping[int, tuple[float, ...]]
MOST_RISES = 1000
"""Kept of a code; a policy asks for no more."""
MOST_TEXT = 4096


def parse_counts(text: str | None) -> dict[int, int]:
    """The annotation of a node; what cannot be read counts for nothing."""
    try:
        found = json.loads((text or "{}")[:MOST_TEXT])
    except ValueError:
        return {}
    return _whole(found) if isinstance(found, dict) else {}


def _whole(found: Mapping[str, object]) -> dict[int, int]:
    return {
        int(code): number
        for code, number in found.items()
        if code.isdecimal() and isinstance(number, int) and number >= 0
    }


def reported_counts(xids: Mapping[str, int]) -> dict[int, int]:
    """What a pod reports."""
    return _whole(xids)


def rises(before: Counts | None, now: Counts, at_s: float) -> dict[int, tuple[float, ...]]:
    """By code, the time once for each that is new."""
    if before is None:
        return {}
    new = {code: number - before.get(code, 0) for code, number in now.items()}
    return {code: (at_s,) * min(n, MOST_RISES) for code, n in new.items() if n > 0}


def joined(old: Rises, new: Rises, since_s: float) -> dict[int, tuple[float, ...]]:
    """Both, without what is older than that."""
    found = {}
    for code in old.keys() | new.keys():
        times = [t for t in (*old.get(code, ()), *new.get(code, ())) if t > since_s]
        if times:
            found[code] = tuple(times[-MOST_RISES:])
    return found
