"""Deadlines in real time, but short: waiting is what they do."""

from __future__ import annotations

import asyncio
import time

from tandem.agent.ending import Deadline


async def test_met() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await Deadline(time.time() + 5, time.time).met_by(event)


async def test_missed() -> None:
    assert not await Deadline(time.time() + 0.01, time.time).met_by(asyncio.Event())


async def test_tightened_while_it_is_waited_for() -> None:
    deadline = Deadline(time.time() + 60, time.time)
    waiting = asyncio.create_task(deadline.met_by(asyncio.Event()))
    await asyncio.sleep(0.01)
    deadline.tighten(time.time() + 0.01)
    async with asyncio.timeout(30):
        assert not await waiting


def test_never_comes_later() -> None:
    deadline = Deadline(10.0, lambda: 0.0)
    deadline.tighten(20.0)
    assert deadline.at_s == 10.0
    deadline.tighten(5.0)
    assert deadline.at_s == 5.0


async def test_an_infinite_deadline_waits() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await Deadline(float("inf"), time.time).met_by(event)
