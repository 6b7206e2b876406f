"""What the handoff needs of the thread that runs the engine (serve/worker.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import StepOutput, StreamOutput

T = TypeVar("T")


class EngineThread(Protocol):
    def call(self, work: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Runs `work` between two steps, in the order of the calls."""

    def until(self, work: Callable[[Engine], T | None]) -> asyncio.Future[T]:
        """Runs `work` after each step and call until it returns something."""

    def route(self, request_id: str, receiver: Callable[[StreamOutput, float], None]) -> None:
        """Outputs of this stream go to `receiver`, with the time their step began."""

    def unroute(self, request_id: str) -> None: ...

    def after_step(self, hook: Callable[[Engine, StepOutput], None]) -> None:
        """Runs `hook` in the thread right after each step, before its outputs are delivered."""
