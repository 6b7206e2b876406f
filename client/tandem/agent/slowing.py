"""A fault on purpose: a container that is slower than it could be, as if by a slow machine.

    kubectl annotate pod NAME local.tandem.dev/slow-percent=25

The container's first process is stopped for a part of each period and goes on for the rest, so that
everything in it takes so much longer: of p percent, a share of p / (100 + p) of the time. What the
stops really took is measured and made up for in the next ones. Nothing else of the process or the
pod changes; without the annotation nothing is stopped. Only agents of the local cluster know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any, Final

from tandem.cluster.process import ProcessId, send_signal

ANNOTATION_SLOW_PERCENT: Final = "local.tandem.dev/slow-percent"
MAX_PERCENT: Final = 400
PERIOD_S: Final = 1.0
"""Many steps of an engine: one that sleeps when it is stopped may sleep on, and loses no time."""
LONGEST_STOP_S: Final = 1.0
"""A probe waits for two seconds."""

Send = Callable[[ProcessId, signal.Signals], bool]


class SlowError(ValueError):
    """The annotation says nothing that can be done; the message says what it should."""


def slow_percent(pod: dict[str, Any]) -> int:
    """By how much a pod is to be slowed; 0: not at all. Raises SlowError."""
    text = (pod["metadata"].get("annotations") or {}).get(ANNOTATION_SLOW_PERCENT)
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_PERCENT):
        raise SlowError(
            f"annotation {ANNOTATION_SLOW_PERCENT} is {text!r}: write a whole number of percent, "
            f"0 to {MAX_PERCENT}, or remove it"
        )
    return int(text)


def stop_s(percent: int, elapsed_s: float, stopped_s: float) -> float:
    """How long the next stop is, so that after one more period so much of the time was stopped."""
    share = percent / (100.0 + percent)
    return min(LONGEST_STOP_S, max(0.0, share * (elapsed_s + PERIOD_S) - stopped_s))


def go_on(process: ProcessId) -> None:
    """Lets a process run that an earlier agent may have stopped when it died."""
    send_signal(process, signal.SIGCONT)


class Slowing:
    """Slows one process at a time, while it is asked to.

    Args:
        clock: monotonic, in seconds.
        sleep: for so many seconds.
        send: a signal to a process; False when it is gone.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = asyncio.sleep,
        send: Send = send_signal,
    ) -> None:
        self._clock, self._sleep, self._send = clock, sleep, send
        self._wanted: tuple[ProcessId, int] | None = None
        self._task: asyncio.Task[None] | None = None

    def set(self, process: ProcessId | None, percent: int) -> None:
        """From now on, until it is called again or the process ends."""
        wanted = (process, percent) if process is not None and percent else None
        if wanted == self._wanted:
            return
        self._wanted = wanted
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if wanted is not None:
            self._task = asyncio.create_task(self.slow(*wanted))

    async def close(self) -> None:
        """The process goes on at full speed."""
        task, self._task, self._wanted = self._task, None, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def slow(self, process: ProcessId, percent: int) -> None:
        """Stops and continues the process until it is gone, or this is cancelled."""
        began_s, stopped_s = self._clock(), 0.0
        while True:
            pause_s = stop_s(percent, self._clock() - began_s, stopped_s)
            stopped_at_s = self._clock()
            try:
                if not self._send(process, signal.SIGSTOP):
                    return
                await self._sleep(pause_s)
            finally:
                self._send(process, signal.SIGCONT)
            stopped_s += self._clock() - stopped_at_s
            await self._sleep(max(0.0, PERIOD_S - pause_s))
