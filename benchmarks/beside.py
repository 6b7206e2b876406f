"""What goes on in a thread beside a block of a benchmark or a test, until the block ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Beside:
    """`with` one of these: `run` goes on in a thread and is to end once `stop` is set.

    Leaving the block waits for it.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.stop = threading.Event()
        self._thread = threading.Thread(target=run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop.set()
        self._thread.join()
