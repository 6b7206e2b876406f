"""The engine's thread, and the event loop's way into it.

The engine is synchronous and used by one thread. Everybody else hands that thread functions to run
between two steps; what a step produced comes back to the event loop in one call. Calls run in the
order in which they were made, so an `abort` made after an `add` finds the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Sequence, StepOutput, StreamOutput
from tandem_runtime.engine.stats import EngineStats
from tandem_runtime.serve.steps import StepTimes

log = logging.getLogger(__name__)

T = TypeVar("T")
Receiver = Callable[[StreamOutput, float], None]
"""Takes one stream's outputs on the event loop, with the time its step began."""
AfterStep = Callable[[Engine, StepOutput], None]

_IDLE_S: Final = 1.0
"""An idle thread says this often that it lives."""
_END_S: Final = 5.0
"""How long a failed engine's thread may take to end."""


class EngineFailed(Exception):
    """The engine's thread died of a fault; the pod has to be restarted."""


class EngineWorker:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._retried: list[_Call] = []
        """Calls of `until` that had no result yet, in order."""
        self._receivers: dict[str, Receiver] = {}
        self._after_step: list[AfterStep] = []
        self._thread: threading.Thread | None = None
        self._built: asyncio.Future[Engine] = self._loop.create_future()
        self._alive_s = clock()
        self.stats: EngineStats | None = None
        """As of the last step or call; None until the engine is built."""
        self.step_times = StepTimes()
        self._unchecked = False
        """Whether a step has run since the engine's bookkeeping was last checked."""
        self.failed: asyncio.Future[None] = self._loop.create_future()
        """Gets an exception, such as `EngineFailed`, when the engine dies; never a result."""

    async def start(self, build: Callable[[], Engine]) -> Engine:
        """Builds the engine in its thread, where it stays; raises what `build` raises.

        The caller may read the engine's constant attributes.
        """
        self._thread = threading.Thread(target=self._run, args=(build,), name="engine", daemon=True)
        self._thread.start()
        return await self._built

    async def stop(self) -> None:
        """Ends the thread after its current step; streams that still run are dropped.

        A failed engine's thread may be stuck: it gets a few seconds.
        """
        if self._thread is not None:
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join, _END_S if self.failed.done() else None)

    def fail(self, error: Exception) -> None:
        """Gives the engine up, whatever its thread does; from any thread. The first call counts."""
        self._post(self._fail, error)

    # -- from the event loop ----------------------------------------------------------------------
    def call(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Runs `work` in the thread, between two steps. Cancelling the future does not stop it."""
        return self._hand_in(work, retry=False)

    def until(self, work: Callable[[Engine], T | None]) -> asyncio.Future[T]:
        """Runs `work` again after each step and call until it returns something; first come,
        first served. Cancelling the future ends it."""
        return self._hand_in(work, retry=True)

    def _hand_in(self, work: Callable[[Engine], T | None], *, retry: bool) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self.failed.done():
            future.set_exception(EngineFailed("the engine has failed"))
        else:
            self._calls.put(_Call(work, future, retry))
        return future

    def route(self, request_id: str, receiver: Receiver) -> None:
        """Outputs of this stream go to `receiver` until `unroute`."""
        self._receivers[request_id] = receiver

    def unroute(self, request_id: str) -> None:
        self._receivers.pop(request_id, None)

    def after_step(self, hook: AfterStep) -> None:
        """Runs `hook` in the thread right after each step, before its outputs are delivered."""
        self._after_step.append(hook)

    @property
    def now_s(self) -> float:
        """On the clock that receivers are told when steps began."""
        return self._clock()

    @property
    def silent_s(self) -> float:
        """Seconds since the thread last said that it lives; a step says so when it ends."""
        return self._clock() - self._alive_s

    # -- in the thread ----------------------------------------------------------------------------
    def _run(self, build: Callable[[], Engine]) -> None:
        try:
            engine = build()
        except BaseException as fault:
            self._post(_set_exception, self._built, fault)
            return
        self.stats = engine.stats()
        engine.on_admission = self._announce
        if engine.tiers is not None:
            engine.tiers.wake = self._wake
        self._post(_set_result, self._built, engine)
        try:
            self._serve(engine)
            engine.close()
        except BaseException as fault:
            log.exception("the engine failed")
            self.fail(EngineFailed(f"the engine failed: {fault}"))

    def _wake(self) -> None:
        """There may be work; from any thread."""
        self._calls.put(_Call(lambda engine: None, self._built, retry=False))

    def _announce(self, sequence: Sequence) -> None:
        """A prompt that another pod waits for: it may make room while this one computes."""
        if sequence.request.export:
            output = StreamOutput(sequence.request_id, cached_tokens=sequence.cached_tokens)
            self._post(self._deliver, StepOutput((output,)), self._clock())

    def _serve(self, engine: Engine) -> None:
        """Raises what a step raises, and AssertionError when blocks and streams disagree."""
        stalled, ended_s = False, None
        while self._run_calls(engine, wait=stalled or not engine.has_work):
            self._alive_s = self._clock()
            # Where steps follow one another, the next one has begun when the one before ended.
            began_s = self._alive_s if ended_s is None else ended_s
            stalled, ended_s = not engine.has_work, None
            if engine.has_work:
                output = engine.step()
                self._unchecked = True
                stalled = output.batch_tokens == 0 and not engine.loads_kv
                if output.batch_tokens:
                    ended_s = self._count(output, began_s)
                for hook in self._after_step:
                    hook(engine, output)
                if output.streams:
                    self._post(self._deliver, output, self._alive_s)
                self._retry(engine)
            self.stats = engine.stats()

    def _count(self, output: StepOutput, began_s: float) -> float:
        """Add a step to the sums; when it ended."""
        ended_s = self._clock()
        prompt = output.batch_tokens - output.next_tokens
        self.step_times.add(prompt, output.next_tokens, ended_s - began_s)
        return ended_s

    def _run_calls(self, engine: Engine, *, wait: bool) -> bool:
        """Runs what has been handed in; False when the worker is to stop."""
        ran = False
        try:
            call = self._calls.get(timeout=_IDLE_S) if wait else self._calls.get_nowait()
            while call is not None:
                ran = True
                if not self._attempt(call, engine):
                    self._retried.append(call)
                call = self._calls.get_nowait()
        except queue.Empty:
            self._retry(engine)
            if wait and not ran:
                self._check(engine)
            return True
        return False

    def _check(self, engine: Engine) -> None:
        """Nobody waits: time to find out whether a block was lost."""
        if self._unchecked:
            self._unchecked = False
            engine.check_integrity()

    def _retry(self, engine: Engine) -> None:
        self._retried = [call for call in self._retried if not self._attempt(call, engine)]

    def _attempt(self, call: _Call, engine: Engine) -> bool:
        """Whether the call is settled."""
        if call.retry and call.future.done():  # given up by its caller
            return True
        try:
            result = call.work(engine)
        except Exception as error:
            self._post(_set_exception, call.future, error)
            return True
        if call.retry and result is None:
            return False
        self._post(_set_result, call.future, result)
        return True

    def _post(self, function: Callable[..., object], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("the event loop is closed: nobody is left to be told")

    # -- from the thread, on the event loop -------------------------------------------------------
    def _deliver(self, output: StepOutput, began_s: float) -> None:
        for stream in output.streams:
            receiver = self._receivers.get(stream.request_id)
            if receiver is not None:
                receiver(stream, began_s)

    def _fail(self, error: Exception) -> None:
        if self.failed.done():
            return
        self.failed.set_exception(error)
        self.failed.exception()  # whoever awaits it sees it; nobody has to
        _set_exception(self._built, error)
        unsettled = self._retried
        with contextlib.suppress(queue.Empty):
            while (call := self._calls.get_nowait()) is not None:
                unsettled.append(call)
        for call in unsettled:
            _set_exception(call.future, error)


@dataclass(frozen=True)
class _Call:
    work: Callable[[Engine], Any]
    future: asyncio.Future[Any]
    retry: bool


def _set_result(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
