"""How a run ended, in a kubelet's words: reason and termination message."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final

from tandem.agent.lifecycle import Exit
from tandem.agent.logs import tail_text
from tandem.agent.store import Ending, RunDir

MESSAGE_LIMIT_BYTES: Final = 4096
FALLBACK_LIMIT_BYTES: Final = 2048
FALLBACK_LIMIT_LINES: Final = 80
START_ERROR: Final = "start-error"
START_ERROR_CODE: Final = 128


def write_start_error(run: RunDir, message: str, at_s: float) -> None:
    """Records that the run's program never ran."""
    (run.path / START_ERROR).write_text(message)
    run.write_ending(Ending(START_ERROR_CODE, 0, at_s))


def exit_of(run: RunDir, ending: Ending, container: Mapping[str, Any]) -> Exit:
    """The end of a run, with its termination message.

    The message is what the program left at terminationMessagePath; where it left nothing, failed,
    and the container's policy is FallbackToLogsOnError, the end of its log.
    """
    with contextlib.suppress(FileNotFoundError):
        message = (run.path / START_ERROR).read_text()
        return Exit(ending.code, 0, ending.finished_at_s, "StartError", message)
    reason = "Completed" if ending.code == 0 else "Error"
    message = _left_message(run)
    falls_back = container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    if not message and ending.code != 0 and falls_back:
        message = tail_text(run.log, FALLBACK_LIMIT_LINES, FALLBACK_LIMIT_BYTES)
    return Exit(ending.code, ending.signal, ending.finished_at_s, reason, message)


def _left_message(run: RunDir) -> str:
    config = run.read_config()
    if config is None:
        return ""
    with contextlib.suppress(OSError), open(config.termination_log, "rb") as file:
        return file.read(MESSAGE_LIMIT_BYTES).decode(errors="replace")
    return ""
