"""The keyed queue: once waiting, once at work, earliest appointment, back-off."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_operator.queue import FIRST_BACKOFF_S, LAST_BACKOFF_S, KeyedQueue


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def queue(time: Time) -> KeyedQueue[str]:
    return KeyedQueue(time, lambda: 1.0)


async def due(queue: KeyedQueue[str]) -> list[str]:
    """Everything that can be taken now."""
    keys = []
    while True:
        try:
            keys.append(await asyncio.wait_for(queue.get(), 0.005))
        except TimeoutError:
            return keys


async def test_a_key_waits_once(queue: KeyedQueue[str]) -> None:
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert await due(queue) == ["a", "b"]


async def test_a_key_at_work_runs_again_afterwards_and_never_twice_at_once(
    queue: KeyedQueue[str],
) -> None:
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    queue.add("b")
    assert await due(queue) == ["b"]
    queue.done("a")
    assert await due(queue) == ["a"]


async def test_the_earliest_appointment_counts(queue: KeyedQueue[str], time: Time) -> None:
    queue.add("a", 10.0)
    queue.add("a", 5.0)
    queue.add("a", 20.0)
    assert await due(queue) == []
    time.now_s = 5.0
    assert await due(queue) == ["a"]
    queue.done("a")
    time.now_s = 30.0
    assert await due(queue) == [], "an appointment that was overtaken came back"


async def test_done_can_ask_for_another_time(queue: KeyedQueue[str], time: Time) -> None:
    queue.add("a")
    await queue.get()
    queue.done("a", 7.0)
    assert await due(queue) == []
    time.now_s = 7.0
    assert await due(queue) == ["a"]


async def test_failures_back_off_and_success_forgets_them(
    queue: KeyedQueue[str], time: Time
) -> None:
    waits = []
    queue.add("a")
    for _ in range(12):
        (key,) = await due(queue)
        waits.append(queue.failed(key))
        time.now_s += waits[-1]
    assert waits[:3] == [FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S, 4 * FIRST_BACKOFF_S]
    assert waits[-1] == LAST_BACKOFF_S
    assert queue.failing == 1
    await due(queue)
    queue.done("a")
    assert queue.failing == 0
    queue.add("a")
    (key,) = await due(queue)
    assert queue.failed(key) == FIRST_BACKOFF_S


async def test_an_event_brings_a_failed_key_forward(queue: KeyedQueue[str]) -> None:
    queue.add("a")
    await due(queue)
    queue.failed("a")
    assert await due(queue) == []
    queue.add("a")
    assert await due(queue) == ["a"]


async def test_a_waiting_worker_is_woken(queue: KeyedQueue[str]) -> None:
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(waiting, 30) == "a"


async def test_appointments_that_were_brought_forward_do_not_pile_up(
    queue: KeyedQueue[str],
) -> None:
    """A pod that starts asks for its deadline, and every event for now."""
    for _ in range(1000):
        queue.add("a", 1800.0)
        queue.add("a")
        assert await queue.get() == "a"
        queue.done("a", 1800.0)
    assert len(queue._heap) < 200


async def test_depth_counts_what_is_due_or_at_work(queue: KeyedQueue[str]) -> None:
    queue.add("a")
    queue.add("b", 10.0)
    assert len(queue) == 1
    await queue.get()
    assert len(queue) == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 5)), max_size=30))
def test_every_key_that_was_added_runs_exactly_once(added: list[tuple[str, float]]) -> None:
    time = Time()
    queue: KeyedQueue[str] = KeyedQueue(time, lambda: 1.0)

    async def run() -> None:
        for key, after_s in added:
            queue.add(key, after_s)
        time.now_s = 10.0
        for expected in range(len({key for key, _ in added})):
            key = await asyncio.wait_for(queue.get(), 30)
            assert expected < 3
            queue.done(key)
        assert len(queue) == 0

    asyncio.run(run())
