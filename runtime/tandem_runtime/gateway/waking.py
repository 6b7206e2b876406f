"""Requests for a fleet that sleeps are held until a pod of it serves.

A fleet without pods is one that the gateway cannot know of: the operator tells it which fleets it
wakes, and reads from the gateway's state how many requests wait for each.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from tandem_runtime.frontend.backend import ModelCard, ServedModel
from tandem_runtime.frontend.errors import Unavailable

HOLD_S: Final = 600.0
"""How long a request waits at most: a large model takes minutes to load."""
MOST_HELD: Final = 256
"""Requests that wait for one fleet at most."""
POLL_S: Final = 0.1
RETRY_AFTER_S: Final = 30


class Waking:
    """The fleets that can be woken, and who waits for them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, hold_s: float = HOLD_S) -> None:
        self._clock = clock
        self._hold_s = hold_s
        self._names: dict[str, tuple[str, ...]] = {}
        self._held: Counter[str] = Counter()
        self.closed = False
        """The gateway ends: whoever waits had better ask another one."""

    def tell(self, fleets: Mapping[str, Sequence[str]]) -> None:
        """From now on these fleets, and no others, are woken; with the names that they serve."""
        self._names = {fleet: tuple(names) for fleet, names in fleets.items()}

    def cards(self) -> dict[str, ModelCard]:
        """A card for each of their names."""
        return {
            name: ModelCard(name, fleet, 0)
            for fleet, names in sorted(self._names.items())
            for name in names
        }

    @property
    def held(self) -> dict[str, int]:
        """Requests that wait, by fleet."""
        return {fleet: count for fleet, count in self._held.items() if count}

    async def hold(self, fleet: str, resolve: Callable[[], Awaitable[ServedModel]]) -> ServedModel:
        """What `resolve` returns, as soon as it does. Raises what it raises where nobody wakes the
        fleet (any more), and `Unavailable` when too many wait or it takes too long."""
        try:
            return await resolve()
        except Unavailable:
            if fleet not in self._names:
                raise
        if self._held[fleet] >= MOST_HELD:
            raise Unavailable(
                f"Fleet '{fleet}' wakes, and {MOST_HELD} requests wait for it already; ask again.",
                retry_after_s=RETRY_AFTER_S,
            )
        deadline_s = self._clock() + self._hold_s
        self._held[fleet] += 1
        try:
            while True:
                if self.closed:
                    raise Unavailable("This gateway is ending; ask again.")
                await asyncio.sleep(POLL_S)
                try:
                    return await resolve()
                except Unavailable as error:
                    if fleet not in self._names:
                        raise
                    if self._clock() >= deadline_s:
                        raise Unavailable(
                            f"Fleet '{fleet}' did not wake within {self._hold_s:g} s: "
                            f"{error.message}",
                            retry_after_s=RETRY_AFTER_S,
                        ) from None
        finally:
            self._held[fleet] -= 1
