"""Starting and ending a container's processes by way of its shim.

Waiting is on pidfds: an idle node costs no polling, and it makes no difference whether this agent
or an earlier one started the shim.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tandem.agent.checking import CommandResult
from tandem.agent.store import ContainerConfig, Ending, RunDir, Started
from tandem.cluster.process import ProcessId, open_pidfd, send_signal

SHIM: Final = (sys.executable, "-S", "-P", "-m", "tandem.agent.shim")
SHIM_ENV: Final = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
"""The shim imports nothing that is installed, only its own few modules."""
START_TIMEOUT_S: Final = 60.0
OUTPUT_LIMIT_BYTES: Final = 16 * 1024
LOST: Final = Ending(code=137, signal=signal.SIGKILL, finished_at_s=0.0)


class StartError(Exception):
    """The container's program never ran; the message says why."""


async def start(run: RunDir, config: ContainerConfig) -> Started:
    """Starts the container of `run`; returns once its program runs.

    Raises:
        StartError: a mount, the working directory or the program itself is at fault.
    """
    run.write_config(config)
    process = _spawn_shim(run)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout as out, process.stderr as err:
        timer = asyncio.get_running_loop().call_later(START_TIMEOUT_S, process.kill)
        line = await asyncio.to_thread(out.readline)
        timer.cancel()
        failure = "" if line else (await asyncio.to_thread(err.read)).decode(errors="replace")
    # From here on the shim is followed by its pid alone, as an adopted one is.
    process.returncode = 0
    if not line:
        _reap(process.pid)
        raise StartError(f"the shim gave up: {failure.strip()[-1000:] or 'it took too long'}")
    answer = json.loads(line)
    if "error" in answer:
        raise StartError(answer["error"])
    return Started.from_dict(answer)


def _spawn_shim(run: RunDir) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*SHIM, "run", str(run.path), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=SHIM_ENV,
    )


async def wait(run: RunDir, started: Started) -> Ending:
    """Waits for the run's end; a shim that was killed takes its container along."""
    await wait_process(started.shim)
    ending = run.ending()
    if ending is None:
        await wait_process(started.process)
        ending = Ending(LOST.code, LOST.signal, time.time())
        run.write_ending(ending)
    return ending


async def wait_process(process: ProcessId) -> None:
    """Returns once exactly this process has ended."""
    fd = open_pidfd(process)
    if fd is None:
        return
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _resolve, ended)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
        _reap(process.pid)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _reap(pid: int) -> None:
    """Lets the kernel forget a child of ours; an adopted process is somebody else's child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def terminate(started: Started) -> None:
    """Asks the container's first process to end."""
    send_signal(started.process, signal.SIGTERM)


def kill(started: Started) -> None:
    """Ends the container's first process, and with it all others of its PID namespace."""
    send_signal(started.process, signal.SIGKILL)


def exec_command(run: RunDir, argv: Sequence[str], *, tty: bool = False) -> list[str]:
    """The command line that runs `argv` inside the running container on its own stdio."""
    return [*SHIM, "exec-tty" if tty else "exec", str(run.path), "--", *argv]


async def execute(run: RunDir, argv: Sequence[str], timeout_s: float | None) -> CommandResult:
    """Runs a command inside the running container; its output is cut at 16 KiB.

    Raises:
        TimeoutError: it took longer; it has been killed.
    """
    process = await asyncio.create_subprocess_exec(
        *exec_command(run, argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env=SHIM_ENV,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(timeout_s):
            output = b""
            while data := await process.stdout.read(65536):
                output = (output + data)[:OUTPUT_LIMIT_BYTES]
            return CommandResult(await process.wait(), output.decode(errors="replace").strip())
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
