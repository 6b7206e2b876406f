"""Schedules: windows of time in which a pool's bounds are others.

A window begins whenever its cron expression comes and lasts for a fixed time. Where windows overlap
the schedule that is listed last counts, alone: an exception stands after its rule. A lower bound is
raised a start-up time ahead, so that the pods are Ready when their window begins.

Cron expressions are Debian's, by cronsim: what a change to summer time skips begins right after
it, and what comes twice in autumn begins once. A window's length is elapsed time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from math import inf
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

LONGEST_LEAD_S = 3600.0
LONGEST_LOOK_S = 60.0
FIELDS = 5
SOME_TIME = datetime(2024, 1, 1)
"""A cron expression that does not come in the fifty years after it never does."""


class ScheduleError(ValueError):
    """A cron expression or zone that cannot be used; the message says why."""


@dataclass(frozen=True)
class Schedule:
    """Other bounds of one pool, now and then. A bound of None is the pool's own."""

    name: str
    cron: str
    duration_s: float
    time_zone: str = "UTC"
    min_replicas: int | None = None
    max_replicas: int | None = None

    def starts(self, after_s: float, until_s: float) -> Iterator[float]:
        """When windows begin (Unix seconds): later than `after_s`, not later than `until_s`."""
        zone = ZoneInfo(self.time_zone)
        for start in CronSim(self.cron, datetime.fromtimestamp(after_s, zone)):
            start_s = start.timestamp()
            if start_s > until_s:
                return
            # In an hour that comes twice cronsim goes on from its first time.
            if start_s > after_s:
                yield start_s

    def open_at(self, at_s: float) -> bool:
        """Whether a window has begun and not ended."""
        return next(self.starts(at_s - self.duration_s, at_s), inf) <= at_s


@dataclass(frozen=True)
class Bounds:
    """What a pool's size may be, and the schedules that say so; "" is the pool itself."""

    min_replicas: int
    max_replicas: int
    min_from: str = ""
    max_from: str = ""


def bounds_at(schedules: Sequence[Schedule], own: Bounds, now_s: float, lead_s: float) -> Bounds:
    """The bounds now, the lower one as high as it will be within `lead_s`.

    The upper one gives way ahead of time only as far as that takes.
    """
    now = _in_force(schedules, own, now_s)
    soon = [_in_force(schedules, own, at_s) for at_s in _changes(schedules, now_s, lead_s)]
    highest = max((now, *soon), key=lambda bounds: bounds.min_replicas)
    if highest.min_replicas <= now.min_replicas:
        return now
    ahead = replace(now, min_replicas=highest.min_replicas, min_from=highest.min_from)
    if ahead.min_replicas > ahead.max_replicas:
        ahead = replace(ahead, max_replicas=ahead.min_replicas, max_from=ahead.min_from)
    return ahead


def lead_s(startup_s: float, look_s: float) -> float:
    """How long ahead a lower bound counts: a start-up, and the time until the next look, which
    would be too late for what begins before."""
    return min(startup_s, LONGEST_LEAD_S) + min(look_s, LONGEST_LOOK_S)


def check(cron: str, time_zone: str) -> None:
    """Raises ScheduleError, with a sentence that says what to give instead."""
    try:
        if len(cron.split()) != FIELDS:
            raise CronSimError(f"it has {len(cron.split())} fields")
        next(CronSim(cron, SOME_TIME))
    except CronSimError as error:
        fault = str(error)
        raise ScheduleError(
            f'cron "{cron}" is not understood ({fault[:1].lower()}{fault[1:]}): give minute, hour, '
            'day of month, month and day of week, such as "0 8 * * 1-5"'
        ) from None
    except StopIteration:
        raise ScheduleError(f'cron "{cron}" never comes: correct its day or month') from None
    try:
        ZoneInfo(time_zone)
    except (KeyError, ValueError, OSError):
        raise ScheduleError(
            f'timeZone "{time_zone}" is not known: give a name of the IANA time zone database, '
            "such as Europe/Berlin, or leave it out for UTC"
        ) from None


def _in_force(schedules: Sequence[Schedule], own: Bounds, at_s: float) -> Bounds:
    for schedule in reversed(schedules):
        if schedule.open_at(at_s):
            least, most = schedule.min_replicas, schedule.max_replicas
            return Bounds(
                own.min_replicas if least is None else least,
                own.max_replicas if most is None else most,
                "" if least is None else schedule.name,
                "" if most is None else schedule.name,
            )
    return own


def _changes(schedules: Sequence[Schedule], now_s: float, lead_s: float) -> list[float]:
    """When a window begins or ends within the lead, in order."""
    found: set[float] = set()
    for schedule in schedules:
        found |= set(schedule.starts(now_s, now_s + lead_s))
        past_s = now_s - schedule.duration_s
        ended = schedule.starts(past_s, past_s + lead_s)
        found |= {start_s + schedule.duration_s for start_s in ended}
    return sorted(found)
