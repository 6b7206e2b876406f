"""The parent of one container: namespaces, mounts, logs, and the record of how it ended.

`python -S -P -m tandem.agent.shim run DIR PARENT` runs what DIR/config.json describes
(`store.ContainerConfig`) for the process PARENT; `... exec DIR -- COMMAND...` runs a command
inside a running container, `exec-tty` on a terminal.

A container is PID 1 of its own PID namespace, so that nothing of it survives its end, in its own
mount, UTS and IPC namespaces. The shim outlives the agent that started it: a killed agent leaves
its containers running, and the next one finds `started.json` and, in the end, `exit.json`.

Standard library only: it runs without site-packages, once a container, and stays small.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

from tandem.agent.shim.kernel import (
    CLONE_NEWPID,
    SetupError,
    die_with_parent,
    map_root,
    outlive_parent,
    start_ticks,
    unshare,
)
from tandem.agent.shim.logwriter import copy_output
from tandem.agent.shim.program import container_main, execute


def write_json(path: str, value: dict[str, Any]) -> None:
    """Writes all of it or nothing."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)


def run(folder: str, parent: int) -> None:
    """Starts the container, reports the start on stdout, then waits for its end.

    Until `started.json` is written the shim dies with the agent that started it: a start that the
    next agent cannot know of must not happen.
    """
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    try:
        if config["rootless"]:
            map_root()
        die_with_parent()
        if os.getppid() != parent:
            return
        unshare(CLONE_NEWPID)
        pid, streams = start(config, folder)
    except SetupError as error:
        report({"error": str(error)})
        return
    started = {
        "shim_pid": os.getpid(),
        "shim_start_ticks": start_ticks(os.getpid()),
        "pid": pid,
        "start_ticks": start_ticks(pid),
        "started_at_s": time.time(),
    }
    write_json(f"{folder}/started.json", started)
    outlive_parent()
    report(started)
    copy_output(config["log"], streams)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    ending = {"code": code if code >= 0 else 128 - code, "signal": max(0, -code)}
    write_json(f"{folder}/exit.json", {**ending, "finished_at_s": time.time()})


def start(config: dict[str, Any], folder: str) -> tuple[int, dict[int, str]]:
    """Forks the container; returns its pid and its output pipes once its program runs.

    Raises:
        SetupError: it did not come that far.
    """
    scratch = f"{folder}/root"
    os.makedirs(scratch, exist_ok=True)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    status_read, status_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for fd in (out_read, err_read, status_read):
            os.close(fd)
        container_main(config, scratch, out_write, err_write, status_write)
    for fd in (out_write, err_write, status_write):
        os.close(fd)
    with os.fdopen(status_read, "rb") as pipe:
        failure = pipe.read().decode(errors="replace")
    if failure:
        os.waitpid(pid, 0)
        raise SetupError(failure)
    return pid, {out_read: "stdout", err_read: "stderr"}


def report(value: dict[str, Any]) -> None:
    """Tells the agent, then lets go of its pipe: the agent may be killed from here on."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(value).encode() + b"\n")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def main() -> None:
    """Entry point."""
    verb, folder, *rest = sys.argv[1:]
    if verb == "run":
        run(folder, int(rest[0]))
        return
    try:
        sys.exit(execute(folder, rest[1:], tty=verb == "exec-tty"))
    except (SetupError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(126)


if __name__ == "__main__":
    main()
