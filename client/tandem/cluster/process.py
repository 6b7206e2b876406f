"""Processes named so that they cannot be confused with later ones: pid and start time.

A pid alone may belong to somebody else by the time it is read back; with the start time of
/proc/PID/stat it names one process for as long as the machine is up. Signals go through a pidfd
that is opened first and checked second, so that none ever reaches a stranger. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process of this boot of the machine."""

    pid: int
    start_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks after boot."""


def identify(pid: int) -> ProcessId | None:
    """The process that has `pid` now; None when it is gone or only a zombie is left of it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in parentheses and may hold anything; the fields follow the last ')'.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[19]))


def is_running(process: ProcessId) -> bool:
    """Whether exactly this process still runs."""
    return identify(process.pid) == process


def open_pidfd(process: ProcessId) -> int | None:
    """A pidfd of exactly this process, readable once it has ended; None when it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if is_running(process):
        return fd
    os.close(fd)
    return None


def send_signal(process: ProcessId, signum: signal.Signals) -> bool:
    """Signals exactly this process; False when it is gone."""
    fd = open_pidfd(process)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, signum)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def wait_gone(processes: Sequence[ProcessId], timeout_s: float) -> list[ProcessId]:
    """Waits until all have ended; returns those that have not after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    left = []
    for process in processes:
        fd = open_pidfd(process)
        if fd is None:
            continue
        try:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            if not poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                left.append(process)
        finally:
            os.close(fd)
    return left


def end(processes: Sequence[ProcessId], grace_s: float) -> None:
    """SIGTERM to all, SIGKILL after `grace_s` to those that are left; returns when none is."""
    for process in processes:
        send_signal(process, signal.SIGTERM)
    for process in wait_gone(processes, grace_s):
        send_signal(process, signal.SIGKILL)
    wait_gone(processes, 10.0)


def die_with_parent() -> None:
    """Asks the kernel to SIGKILL this process when the thread that started it ends."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def become_subreaper() -> None:
    """Makes orphans among this process's descendants its own children."""
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spawn_child(argv: Sequence[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a child that cannot outlive this process; its output is appended to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            process_group=0,
            preexec_fn=die_with_parent,
        )
