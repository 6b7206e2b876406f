from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from hash_engine import HashRunner, continuation, hash_engine
from hash_pods import eventually
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request, RequestRefused, StreamOutput
from tandem_runtime.protocol import Sampling
from tandem_runtime.serve.worker import EngineFailed, EngineWorker


@pytest.fixture
async def worker() -> AsyncIterator[EngineWorker]:
    worker = EngineWorker()
    await worker.start(hash_engine)
    yield worker
    await worker.stop()


def request(name: str, count: int = 5) -> Request:
    return Request(name, [1, 2, 3], Sampling(max_tokens=count))


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for before the worker: its thread wakes for what happens, not from time to time."""
    monkeypatch.setattr("tandem_runtime.serve.worker._IDLE_S", 600.0)


async def collect(worker: EngineWorker, name: str, count: int = 5) -> list[StreamOutput]:
    outputs: list[StreamOutput] = []
    ended = asyncio.Event()

    def receive(output: StreamOutput, began_s: float) -> None:
        outputs.append(output)
        if output.finish_reason is not None:
            ended.set()

    worker.route(name, receive)
    await worker.call(lambda engine: engine.add(request(name, count)))
    await asyncio.wait_for(ended.wait(), 30)
    worker.unroute(name)
    return outputs


async def test_streams_run_side_by_side(worker: EngineWorker) -> None:
    streams = await asyncio.gather(*(collect(worker, f"s{n}") for n in range(8)))
    expected = continuation([1, 2, 3], 5)
    for outputs in streams:
        assert [o.token.token_id for o in outputs if o.token] == expected


async def test_calls_run_in_the_engines_thread_in_order(worker: EngineWorker) -> None:
    seen: list[int] = []
    futures = [worker.call(lambda engine, n=n: seen.append(n)) for n in range(100)]
    threads = worker.call(lambda engine: threading.current_thread().name)
    await asyncio.gather(*futures)
    assert seen == list(range(100))
    assert await threads == "engine"


async def test_a_call_that_fails_fails_alone(worker: EngineWorker) -> None:
    refused = worker.call(lambda engine: engine.add(Request("x", [], Sampling(max_tokens=1))))
    with pytest.raises(RequestRefused):
        await refused
    assert await worker.call(lambda engine: engine.has_work) is False


async def test_until_waits_for_a_change(never_idle: None, worker: EngineWorker) -> None:
    order: list[str] = []

    def ready(name: str) -> str | None:
        if len(order) < 1:
            return None
        order.append(name)
        return name

    first = worker.until(lambda engine: ready("first"))
    second = worker.until(lambda engine: ready("second"))
    given_up = worker.until(lambda engine: ready("given up"))
    given_up.cancel()
    await asyncio.sleep(0.05)
    assert not first.done()
    await worker.call(lambda engine: order.append("change"))
    assert await asyncio.wait_for(asyncio.gather(first, second), 30) == ["first", "second"]
    assert order == ["change", "first", "second"]


async def test_until_is_retried_after_the_last_step(never_idle: None, worker: EngineWorker) -> None:
    """Blocks come free in a step; whoever waits for them is not left to the idle timeout."""

    def idle_after_work(engine: Engine) -> bool | None:
        return True if engine.stats().generated_tokens == 5 else None

    waiting = worker.until(idle_after_work)
    await collect(worker, "s")
    await asyncio.wait_for(waiting, 30)


async def test_until_passes_exceptions_on(worker: EngineWorker) -> None:
    with pytest.raises(KeyError):
        await worker.until(lambda engine: engine.read_kv("nobody", 0, 1))


async def test_a_fault_in_a_step_fails_everything_that_waits() -> None:
    runner = HashRunner(65)

    def explode(batch: object) -> None:
        raise RuntimeError("out of memory")

    runner.before_step = explode
    worker = EngineWorker()
    await worker.start(lambda: hash_engine(runner=runner))
    waiting = worker.until(lambda engine: None)
    await worker.call(lambda engine: engine.add(request("s")))
    with pytest.raises(EngineFailed, match="out of memory"):
        await asyncio.wait_for(worker.failed, 30)
    with pytest.raises(EngineFailed):
        await waiting
    with pytest.raises(EngineFailed):
        await worker.call(lambda engine: 1)
    await worker.stop()


async def test_an_idle_thread_says_that_it_lives_and_a_stuck_one_does_not() -> None:
    stuck = threading.Event()
    runner = HashRunner(65)
    runner.before_step = lambda batch: bool(stuck.wait())
    worker = EngineWorker()
    await worker.start(lambda: hash_engine(runner=runner))
    await asyncio.sleep(3)
    assert worker.silent_s < 3
    await worker.call(lambda engine: engine.add(request("s")))
    try:
        await eventually(lambda: worker.silent_s > 3)
    finally:
        stuck.set()
        await worker.stop()


async def test_an_idle_engine_whose_blocks_do_not_add_up_fails() -> None:
    worker = EngineWorker()
    engine = await worker.start(hash_engine)
    await collect(worker, "s")
    engine._scheduler.pool._references[1] += 1
    with pytest.raises(EngineFailed):
        await asyncio.wait_for(worker.failed, 30)
    await worker.stop()


async def test_a_build_that_fails_is_told_to_whoever_started() -> None:
    def build() -> Engine:
        raise ValueError("no weights")

    worker = EngineWorker()
    with pytest.raises(ValueError, match="no weights"):
        await worker.start(build)
    await worker.stop()
