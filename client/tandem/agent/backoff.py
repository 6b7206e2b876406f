"""How long a container that ended waits before it runs again: a kubelet's rule.

The first restart is at once, the next ones wait 10 s, 20 s, 40 s ... at most 300 s, counted from
the end of the run. A run of ten minutes or more wipes the slate. The same delays space the tries
to find an image.
"""

from __future__ import annotations

from typing import Final

FIRST_DELAY_S: Final = 10.0
LAST_DELAY_S: Final = 300.0
FORGIVEN_AFTER_S: Final = 2 * LAST_DELAY_S


def delay_s(strikes: int) -> float:
    """The wait after the end of a run that `strikes` restarts in a row preceded."""
    if strikes == 0:
        return 0.0
    # 2**5 already passes the limit; the bound keeps the power small for a pod that never works.
    return min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(strikes - 1, 5))


def effective_strikes(strikes: int, ran_s: float) -> int:
    """The strikes that count once the run has ended after `ran_s`."""
    return 0 if ran_s >= FORGIVEN_AFTER_S else strikes


def image_delay_s(tries: int) -> float:
    """The wait after the failed try to find an image that `tries` others preceded."""
    return delay_s(tries + 1)
