"""What the processes of gateway and pods share: how they start, stop and give up."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from tandem_runtime import contract

MIN_SECRET_BYTES: Final = 16

T = TypeVar("T")


class BadConfig(Exception):
    """A restart does not help; the message says what to change."""


def main(parse: Callable[[], T], run: Callable[[T], Coroutine[Any, Any, int]]) -> int:
    """The exit status; `contract.EXIT_BAD_CONFIG` with a sentence after `BadConfig`."""
    logging.basicConfig(
        level=os.environ.get("TANDEM_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        return uvloop.run(run(parse()))
    except BadConfig as error:
        leave_word(str(error))
        return contract.EXIT_BAD_CONFIG


def leave_word(reason: str) -> None:
    """Why this process gives up: the last line of its log, and what Kubernetes shows of it."""
    sentence = f"{reason}.".replace("..", ".")
    print(sentence, file=sys.stderr)
    termination_log = Path(contract.TERMINATION_LOG)
    if termination_log.exists():
        termination_log.write_text(sentence)


def stop_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, asked_to_stop.set)
    return asked_to_stop


def read_secret(path: Path, *, required: bool) -> bytes:
    """The namespace's handoff secret. Raises `BadConfig` where it is missing or too short."""
    try:
        secret = path.read_bytes().strip()
    except FileNotFoundError:
        if not required:
            return b""
        raise BadConfig(
            f"the handoff secret {path} is missing: a namespace's gateways and pods prove it to "
            f"each other. Mount the Secret {contract.HANDOFF_SECRET_NAME} there, or name the "
            "file with --handoff-secret-file"
        ) from None
    except OSError as error:
        raise BadConfig(f"the handoff secret {path} cannot be read: {error}") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise BadConfig(
            f"the handoff secret {path} has {len(secret)} bytes; it needs at least "
            f"{MIN_SECRET_BYTES} random ones"
        )
    return secret
