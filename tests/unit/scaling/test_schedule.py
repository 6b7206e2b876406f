"""Schedules: when windows are open, which one counts, and what the law makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_operator.plan.scaling.decision import Decision, ScaleReason
from tandem_operator.plan.scaling.fleet import decide_fleet
from tandem_operator.plan.scaling.policy import Policy
from tandem_operator.plan.scaling.record import Look, line, replay
from tandem_operator.plan.scaling.schedule import (
    Bounds,
    Schedule,
    ScheduleError,
    bounds_at,
    check,
)
from tandem_operator.plan.scaling.state import ScalingState
from tandem_operator.plan.scaling.window import NO_STEPS, Load, PoolWindow, step

BERLIN = "Europe/Berlin"
WORKDAYS = Schedule("workdays", "0 8 * * 1-5", 36_000.0, BERLIN, 8, 20)
OWN = Bounds(1, 30)
NOBODY = Load(0.0, 0.0, 0.0, 0.0)


def unix_s(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


MONDAY_8 = unix_s("2026-11-30T08:00+01:00")


@pytest.mark.parametrize(
    ("at", "is_open"),
    [
        ("2026-11-30T07:59:59+01:00", False),
        ("2026-11-30T08:00:00+01:00", True),
        ("2026-11-30T17:59:59+01:00", True),
        ("2026-11-30T18:00:00+01:00", False),
        ("2026-11-29T12:00:00+01:00", False),
        ("2026-07-01T08:00:00+02:00", True),
        ("2026-07-01T07:59:59+02:00", False),
    ],
)
def test_a_window_is_open_from_its_cron_time_on_for_its_duration(at: str, is_open: bool) -> None:
    assert WORKDAYS.open_at(unix_s(at)) is is_open


@pytest.mark.parametrize(
    ("night", "begins"),
    [
        # 2:30 is skipped: the window begins at 3:00 summer time.
        ("2026-03-29", "2026-03-29T03:00+02:00"),
        # 2:30 comes twice: the first counts.
        ("2026-10-25", "2026-10-25T02:30+02:00"),
    ],
)
def test_a_window_at_a_change_of_the_clocks_begins_once_and_keeps_its_length(
    night: str, begins: str
) -> None:
    schedule = Schedule("night", "30 2 * * *", 7200.0, BERLIN, 4)
    noon_s = unix_s(f"{night}T12:00+00:00")
    start_s = unix_s(begins)
    assert list(schedule.starts(noon_s - 43_200, noon_s)) == [start_s]
    opened = [s for s in range(int(noon_s) - 43_200, int(noon_s), 60) if schedule.open_at(s)]
    assert opened == list(range(int(start_s), int(start_s) + 7200, 60))


CRONS = st.sampled_from(
    ("30 2 * * *", "0 8 * * 1-5", "*/20 * * * *", "0 0 1 * *", "15 */3 * * 0", "0 0 29 2 *")
)
ZONES = st.sampled_from(
    (BERLIN, "UTC", "America/Havana", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Apia")
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    least = draw(st.one_of(st.none(), st.integers(1, 15)))
    return Schedule(
        draw(st.sampled_from("abc")),
        draw(CRONS),
        float(draw(st.sampled_from((60, 3600, 36_000, 604_800)))),
        draw(ZONES),
        least,
        draw(st.one_of(st.none(), st.integers(15, 30))),
    )


def changes_of_clocks(zone: str, year: int) -> list[float]:
    """Hours of the year at whose end the zone's offset is another one."""
    begin = datetime(year, 1, 1, tzinfo=UTC)
    hours = [begin + timedelta(hours=n) for n in range(366 * 24)]
    offsets = [hour.astimezone(ZoneInfo(zone)).utcoffset() for hour in hours]
    return [
        hour.timestamp()
        for hour, one, other in zip(hours, offsets, offsets[1:], strict=False)
        if one != other
    ]


CHANGES = [s for zone in (BERLIN, "America/Havana", "Australia/Lord_Howe")
           for s in changes_of_clocks(zone, 2026)]  # fmt: skip
times = st.one_of(
    st.floats(1.7e9, 1.9e9),
    st.builds(lambda s, near: s + near, st.sampled_from(CHANGES), st.integers(-10_800, 10_800)),
)


@given(schedules(), times, st.floats(0.0, 172_800.0))
@settings(max_examples=150, deadline=None)
def test_when_windows_begin_does_not_depend_on_when_it_is_asked(
    schedule: Schedule, at_s: float, later_s: float
) -> None:
    until_s = at_s + 180_000.0
    middle_s = at_s + later_s
    starts = list(schedule.starts(at_s, until_s))
    assert starts == sorted(set(starts))
    assert [s for s in starts if s > middle_s] == list(schedule.starts(middle_s, until_s))
    for start_s in starts[:3]:
        assert schedule.open_at(start_s)
        assert schedule.open_at(start_s + schedule.duration_s - 1.0)
    zone = ZoneInfo(schedule.time_zone)
    if schedule.cron == "30 2 * * *":
        days = [datetime.fromtimestamp(s, zone).date() for s in starts]
        assert len(set(days)) == len(days)


@given(st.lists(schedules(), max_size=4), times, st.sampled_from((0.0, 100.0, 1800.0)))
@settings(max_examples=100, deadline=None)
def test_bounds_hold_together_and_are_raised_ahead(
    found: list[Schedule], now_s: float, lead_s: float
) -> None:
    now = bounds_at(found, OWN, now_s, lead_s)
    assert OWN.min_replicas <= now.min_replicas <= now.max_replicas <= OWN.max_replicas
    assert now == bounds_at(found, OWN, now_s, lead_s)
    # As high as at any time within the lead, and no higher.
    later = [bounds_at(found, OWN, now_s + share * lead_s, 0.0) for share in (0.0, 0.3, 0.9)]
    assert all(now.min_replicas >= bounds.min_replicas for bounds in later)
    stated = {schedule.min_replicas for schedule in found} | {OWN.min_replicas}
    assert now.min_replicas in stated
    assert now.max_replicas >= later[0].max_replicas


def test_of_overlapping_windows_the_last_in_the_list_counts_alone() -> None:
    holiday = Schedule("holiday", "0 0 30 11 *", 86_400.0, BERLIN, None, 5)
    noon_s = unix_s("2026-11-30T12:00+01:00")
    assert bounds_at((WORKDAYS, holiday), OWN, noon_s, 0.0) == Bounds(1, 5, "", "holiday")
    assert bounds_at((holiday, WORKDAYS), OWN, noon_s, 0.0) == Bounds(8, 20, *2 * ("workdays",))
    # Neither is what is overruled raised ahead.
    assert bounds_at((WORKDAYS, holiday), OWN, MONDAY_8 - 60, 100.0).min_replicas == 1


def test_the_lower_bound_rises_ahead_and_falls_in_time() -> None:
    night = Schedule("night", "0 20 * * *", 43_200.0, BERLIN, None, 2)
    pair = (night, WORKDAYS)
    assert bounds_at(pair, OWN, MONDAY_8 - 101, 100.0) == Bounds(1, 2, "", "night")
    assert bounds_at(pair, OWN, MONDAY_8 - 100, 100.0) == Bounds(8, 8, "workdays", "workdays")
    assert bounds_at(pair, OWN, MONDAY_8, 100.0) == Bounds(8, 20, "workdays", "workdays")
    end_s = MONDAY_8 + 36_000
    assert bounds_at(pair, OWN, end_s - 1, 100.0).min_replicas == 8
    assert bounds_at(pair, OWN, end_s, 100.0) == OWN


@pytest.mark.parametrize(
    ("cron", "zone", "sentence"),
    [
        ("0 25 * * *", "UTC", 'cron "0 25 * * *" is not understood (bad hour): give minute'),
        ("0 8 * *", "UTC", "(it has 4 fields): give minute, hour"),
        ("0 0 8 * * 1", "UTC", "(it has 6 fields)"),
        ("0 0 31 2 *", "UTC", "(bad day-of-month)"),
        ("0 8 * * MONDAY", "UTC", "(bad day-of-week)"),
        ("0 8 * * *", "Europe/Bonn", 'timeZone "Europe/Bonn" is not known: give a name of the'),
        ("0 8 * * *", "../etc/passwd", 'timeZone "../etc/passwd" is not known'),
        ("0 8 * * *", "Europe", 'timeZone "Europe" is not known'),
    ],
)
def test_what_cannot_be_used_gets_a_sentence(cron: str, zone: str, sentence: str) -> None:
    with pytest.raises(ScheduleError) as refused:
        check(cron, zone)
    assert sentence in str(refused.value)


def run(
    policy: Policy, begin_s: float, end_s: float, size: int, load: Load = NOBODY
) -> list[tuple[float, Decision]]:
    """Looks every 10 s at a pool whose pods are Ready at once."""
    found, state, now_s = [], ScalingState(startup_s=95.0), begin_s
    while now_s < end_s:
        window = PoolWindow(10.0, size, size, load=load)
        decision = decide_fleet({"p": policy}, {"p": state}, {"p": window}, None, now_s)["p"]
        found.append((now_s, decision))
        state, size, now_s = decision.state, decision.target, now_s + 10.0
    return found


def test_pods_are_asked_for_a_startup_before_the_window_and_may_sleep_after_it() -> None:
    policy = Policy("decode", 0, 30, idle_s=600.0, schedules=(WORKDAYS,))
    looks = run(policy, MONDAY_8 - 600, MONDAY_8 + 36_600, size=0)
    rise_s, rise = next((s, d) for s, d in looks if d.target)
    # Ready when it begins: the next look would have been too late.
    assert 95.0 <= MONDAY_8 - rise_s < 95.0 + 2 * 10.0
    assert (rise.target, rise.reason) == (8, ScaleReason.SCHEDULE)
    assert (rise.numbers.limited_by, rise.numbers.schedule) == ("minReplicas", "workdays")
    sizes = {d.target for s, d in looks if rise_s <= s < MONDAY_8 + 36_000}
    assert sizes == {8}
    # Nobody has asked for ten hours: the first look after the window ends it.
    assert next(d for s, d in looks if s >= MONDAY_8 + 36_000).target == 0


def test_a_window_cuts_a_pool_to_its_upper_bound_and_says_so() -> None:
    night = Schedule("night", "0 20 * * *", 43_200.0, BERLIN, None, 2)
    at_s = unix_s("2026-11-30T20:00+01:00")
    (_, before), (_, then) = run(
        Policy("decode", 1, 30, schedules=(night,)), at_s - 10, at_s + 1, 9
    )
    assert before.numbers.schedule == ""
    assert before.target > 2
    assert (then.target, then.reason) == (2, ScaleReason.SCHEDULE)
    assert (then.numbers.limited_by, then.numbers.schedule) == ("maxReplicas", "night")
    assert (then.numbers.min_replicas, then.numbers.max_replicas) == (1, 2)


def test_inside_a_budget_a_schedules_minimum_comes_before_another_pools_need() -> None:
    """Prefill needs all it has; decode's window asks for four of its GPUs."""
    day = replace(WORKDAYS, min_replicas=5)
    policies = {"d": Policy("decode", 1, 30, schedules=(day,)), "p": Policy("prefill", 1, 30)}
    steps = sum((step(p, 0, 0.008 + 2e-5 * p).scaled(100.0) for p in (2000, 8000)), NO_STEPS)
    busy = Load(400.0, 4e6, 0.0, 0.0, steps=steps, step_tokens=8192.0)
    sizes, states, now_s = {"d": 1, "p": 11}, dict[str, ScalingState](), MONDAY_8 + 60
    for _ in range(20):
        windows = {n: PoolWindow(10.0, s, s, load=NOBODY if n == "d" else busy)
                   for n, s in sizes.items()}  # fmt: skip
        decided = decide_fleet(policies, states, windows, 12, now_s)
        sizes = {name: decision.target for name, decision in decided.items()}
        states = {name: decision.state for name, decision in decided.items()}
        assert sum(sizes.values()) <= 12
        now_s += 10.0
    assert sizes == {"d": 5, "p": 7}


def test_the_log_replays_with_its_schedules(plant: Callable[..., Any]) -> None:
    policy = plant(schedules=(WORKDAYS,)).policy
    states: dict[str, ScalingState] = {}
    size, lines = 2, []
    for tick in range(30):
        now_s = MONDAY_8 - 200 + 10.0 * tick
        windows = {"p": PoolWindow(10.0, size, size, load=NOBODY)}
        look = Look(now_s, {"p": policy}, states, windows)
        decided = look.decide()
        lines.append(line("team/chat", look, decided))
        size, states = decided["p"].target, {"p": decided["p"].state}
    replayed = [replay(text) for text in lines]
    assert all(one is not None and one.same for one in replayed)
    assert {one.decided["p"][1] for one in replayed if one} >= {"Schedule"}
