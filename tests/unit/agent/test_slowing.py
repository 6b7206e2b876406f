"""Containers that are slowed on purpose."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.agent.slowing import (
    ANNOTATION_SLOW_PERCENT,
    LONGEST_STOP_S,
    PERIOD_S,
    SlowError,
    Slowing,
    go_on,
    slow_percent,
    stop_s,
)
from tandem.cluster.process import ProcessId, identify, send_signal

PROCESS = ProcessId(1, 1)


def pod(text: str | None) -> dict[str, object]:
    return {"metadata": {"annotations": {} if text is None else {ANNOTATION_SLOW_PERCENT: text}}}


def test_the_annotation() -> None:
    assert slow_percent({"metadata": {}}) == 0
    assert slow_percent(pod(None)) == 0
    assert slow_percent(pod("25")) == 25


@pytest.mark.parametrize("text", ["", "x", "-5", "2.5", "401", "25%", "²"])
def test_an_annotation_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(SlowError, match="write a whole number of percent, 0 to 400, or remove it"):
        slow_percent(pod(text))


@given(st.integers(1, 400), st.floats(0, 1e4), st.floats(0, 1e4))
def test_no_stop_is_longer_than_a_probe_waits(percent: int, elapsed: float, stopped: float) -> None:
    assert 0.0 <= stop_s(percent, elapsed, stopped) <= LONGEST_STOP_S


class Time:
    """Passes in sleeps, each of which takes `late_s` longer."""

    def __init__(self, late_s: float) -> None:
        self.now_s, self.late_s = 0.0, late_s
        self.stopped_s, self.since_s = 0.0, 0.0
        self.signals: list[signal.Signals] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.late_s

    def send(self, process: ProcessId, number: signal.Signals) -> bool:
        self.signals.append(number)
        if number is signal.SIGSTOP:
            self.since_s = self.now_s
        else:
            self.stopped_s += self.now_s - self.since_s
        return self.now_s < 200.0


@pytest.mark.parametrize("late_s", [0.0, 0.01])
@pytest.mark.parametrize("percent", [10, 25, 50, 400])
async def test_a_slowed_process_runs_for_its_share(percent: int, late_s: float) -> None:
    """Also where the agent's own timers are late."""
    time = Time(late_s)
    await Slowing(time, time.sleep, time.send).slow(PROCESS, percent)
    runs_s = time.now_s - time.stopped_s
    assert time.now_s / runs_s == pytest.approx(1 + percent / 100, rel=0.02)
    assert time.signals[-1] is signal.SIGCONT


@pytest.fixture
def child() -> Iterator[ProcessId]:
    process = subprocess.Popen(["sleep", "600"])
    found = identify(process.pid)
    assert found is not None
    yield found
    process.kill()
    process.wait()


def state(process: ProcessId) -> str:
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


async def until(process: ProcessId, wanted: str) -> None:
    deadline_s = time.monotonic() + 60
    while (state(process) == "T") != (wanted == "T"):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(PERIOD_S / 50)


async def test_a_process_that_is_not_slowed_any_more_runs(child: ProcessId) -> None:
    slowing = Slowing()
    slowing.set(child, 400)
    await until(child, "T")
    slowing.set(child, 0)
    await until(child, "S")
    slowing.set(child, 400)
    await until(child, "T")
    await slowing.close()
    assert state(child) != "T"


async def test_the_end_of_the_process_ends_the_slowing(child: ProcessId) -> None:
    gone = ProcessId(child.pid, child.start_ticks + 1)
    await asyncio.wait_for(Slowing().slow(gone, 50), 60)
    assert state(child) != "T"


async def test_what_a_dead_agent_left_stopped_goes_on(child: ProcessId) -> None:
    send_signal(child, signal.SIGSTOP)
    await until(child, "T")
    go_on(child)
    await until(child, "S")
