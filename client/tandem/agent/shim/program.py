"""Becoming a container's program: as its first process, or as a further one by exec."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import termios
import traceback
from typing import Any, NoReturn

from tandem.agent.shim.kernel import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWUTS,
    SetupError,
    die_with_parent,
    set_hostname,
    set_namespace,
    start_ticks,
    unshare,
)
from tandem.agent.shim.rootfs import build_root, enter_root


def container_main(
    config: dict[str, Any], scratch: str, out: int, err: int, status: int
) -> NoReturn:
    """PID 1 of the container: sets up, then becomes the container's program.

    `status` is closed by a successful exec; otherwise it carries the reason.
    """
    try:
        die_with_parent()
        os.setsid()
        for cgroup in config["cgroups"]:
            with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as procs:
                procs.write("0")
        unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
        set_hostname(config["hostname"])
        enter_root(build_root(config, scratch))
        enter_program(config, config["argv"], [os.open("/dev/null", os.O_RDONLY), out, err])
    except BaseException as error:
        os.write(status, describe(error).encode())
    os._exit(128)


def enter_program(config: dict[str, Any], argv: list[str], stdio: list[int]) -> NoReturn:
    """Becomes `argv`, looked up in the container's PATH, with `stdio` as descriptors 0 to 2."""
    try:
        os.chdir(config["working_dir"])
    except OSError as error:
        raise SetupError(f"workingDir {config['working_dir']}: {error.strerror}") from None
    for number, fd in enumerate(stdio):
        os.dup2(fd, number)
    for signum in (signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    try:
        os.execvpe(argv[0], argv, config["env"])
    except OSError as error:
        missing = error.errno == errno.ENOENT
        why = "executable file not found in $PATH" if missing else error.strerror
        raise SetupError(f'exec: "{argv[0]}": {why}') from None


def describe(error: BaseException) -> str:
    """One sentence for an expected failure, a traceback for a bug."""
    if isinstance(error, SetupError):
        return str(error)
    return "".join(traceback.format_exception(error))


def execute(folder: str, argv: list[str], *, tty: bool) -> int:
    """Runs `argv` in the container of `folder`, on this process's stdio; returns its status.

    `tty`: the stdio is a terminal, which becomes the command's controlling one.
    """
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    with open(f"{folder}/started.json", encoding="utf-8") as file:
        started = json.load(file)
    pid = started["pid"]
    if start_ticks(pid) != started["start_ticks"]:
        raise SetupError("the container has ended")
    spaces = ["ipc", "uts", "pid", "mnt"]
    if config["rootless"]:
        spaces.insert(0, "user")
    handles = [os.open(f"/proc/{pid}/ns/{space}", os.O_RDONLY) for space in spaces]
    for space, handle in zip(spaces, handles, strict=True):
        set_namespace(handle, space)
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            if tty:
                os.setsid()
                fcntl.ioctl(0, termios.TIOCSCTTY, 1)
            enter_program(config, argv, [0, 1, 2])
        except BaseException as error:
            os.write(2, describe(error).encode() + b"\n")
        os._exit(126)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
