"""Ending a container in peace: preStop hook, SIGTERM, then SIGKILL at a deadline.

The deadline may come nearer while it is waited for: a second `kubectl delete` with a shorter grace
period takes effect at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from tandem.agent import runtime
from tandem.agent.checking import Verdict
from tandem.agent.store import Started

LEAST_GRACE_S: Final = 2.0
"""Even a force-deleted container gets this long between SIGTERM and SIGKILL."""


class Deadline:
    """A moment that only ever comes nearer."""

    def __init__(self, at_s: float, clock: Callable[[], float]) -> None:
        self.at_s = at_s
        self._clock = clock
        self._moved = asyncio.Event()

    def tighten(self, at_s: float) -> None:
        """Brings the deadline forward to `at_s`; never back."""
        if at_s < self.at_s:
            self.at_s = at_s
            self._moved.set()

    async def met_by(self, event: asyncio.Event) -> bool:
        """Waits for `event`; False when the deadline comes first."""
        while not event.is_set():
            left_s = self.at_s - self._clock()
            if left_s <= 0:
                return False
            self._moved.clear()
            await first_of((event, self._moved), left_s)
        return True


async def first_of(events: tuple[asyncio.Event, ...], timeout_s: float) -> None:
    """Returns when one of the events is set, or after the timeout."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def end_container(
    started: Started,
    exited: asyncio.Event,
    deadline: Deadline,
    clock: Callable[[], float],
    pre_stop: Callable[[], Awaitable[Verdict]] | None,
) -> str | None:
    """Ends a running container; returns once it has exited.

    Returns what was wrong with the preStop hook, if anything was.
    """
    complaint = None
    if pre_stop is not None and not exited.is_set():
        complaint = await _perform_hook(pre_stop, exited, deadline)
    runtime.terminate(started)
    # A hook that used all the time must not cost the program its chance to end by itself.
    least = Deadline(clock() + LEAST_GRACE_S, clock)
    if not await deadline.met_by(exited) and not await least.met_by(exited):
        runtime.kill(started)
        await exited.wait()
    return complaint


async def _perform_hook(
    hook: Callable[[], Awaitable[Verdict]], exited: asyncio.Event, deadline: Deadline
) -> str | None:
    over = asyncio.Event()
    performing = asyncio.ensure_future(hook())
    watching = asyncio.create_task(exited.wait())
    for future in (performing, watching):
        future.add_done_callback(lambda _: over.set())
    try:
        in_time = await deadline.met_by(over)
    finally:
        watching.cancel()
        if not performing.done():
            performing.cancel()
    if not in_time:
        return "PreStopHook took longer than the grace period"
    if exited.is_set() or performing.result().success:
        return None
    return f"PreStopHook failed: {performing.result().message}"
