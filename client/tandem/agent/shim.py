"""The parent of one container: namespaces, mounts, logs, and the record of how it ended.

`python -S -E -I shim.py run DIR` runs what DIR/config.json describes (`store.ContainerConfig`);
`... exec DIR -- COMMAND...` runs a command inside a running container.

A container is PID 1 of its own PID namespace, so that nothing of it survives its end, in its own
mount, UTS and IPC namespaces. Its root is the machine's root filesystem under a private writable
layer (overlayfs), with volumes bound over it: what a container writes outside its volumes is gone
with it, as with an image. The shim outlives the agent that started it: a killed agent leaves its
containers running, and the next one finds `started.json` and, in the end, `exit.json`.

Standard library only, and no import of Tandem: it runs without site-packages, once a container.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import sys
import termios
import time
import traceback
from typing import Any, Final, NoReturn

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 2
PR_SET_PDEATHSIG: Final = 1
SYS_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}[os.uname().machine]

LINE_LIMIT_BYTES: Final = 16 * 1024
"""A longer line is cut into partial records (tag P), as container runtimes do."""
DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")

_libc: Final = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step before the container's own program failed; the message names the step."""


# -- system calls ---------------------------------------------------------------------------


def check(result: int, step: str) -> None:
    """Raises SetupError with the kernel's reason when a system call failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise SetupError(f"{step}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    check(_libc.unshare(ctypes.c_int(flags)), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    check(
        _libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
        ),
        f"mount {source or kind} on {target}",
    )


def bind(source: str, target: str, *, read_only: bool = False) -> None:
    """Makes `source` (a file or a folder, with what is mounted below it) appear at `target`."""
    mount(source, target, "", MS_BIND | MS_REC)
    if read_only:
        # A bind ignores MS_RDONLY, and a remount must repeat the flags that the source has.
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


# -- the container's filesystem -------------------------------------------------------------


def build_root(config: dict[str, Any], scratch: str) -> str:
    """Assembles the container's root below `scratch` and returns it. In the new namespaces."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", scratch, "tmpfs", 0, "mode=0755")
    upper, work, root = (f"{scratch}/{name}" for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        os.mkdir(folder)
    options = f"lowerdir=/,upperdir={upper},workdir={work}"
    if config["rootless"]:
        options += ",userxattr"
    mount("overlay", root, "overlay", 0, options)
    for point in host_mounts(config["private"]):
        if os.path.lexists(root + point):
            bind(point, root + point, read_only=True)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    bind("/sys", f"{root}/sys", read_only=True)
    build_dev(root, config["devices"])
    for point in config["private"]:
        place_folder(root, point)
        mount("tmpfs", root + point, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for path in config["image_paths"]:
        place_folder(root, path)
        bind(path, root + path, read_only=True)
    for name, text in config["files"].items():
        with open(root + os.path.realpath(name), "w", encoding="utf-8") as file:
            file.write(text)
    for entry in config["mounts"]:
        place(root, entry)
    if config["read_only_root"]:
        mount("", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY)
    return root


def host_mounts(private: list[str]) -> list[str]:
    """The machine's other filesystems, outermost first; an overlay of / does not show them."""
    skipped = ("/proc", "/sys", "/dev", *private)
    points = []
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        for line in table:
            point = line.split()[4].encode().decode("unicode_escape")
            if point != "/" and not any(
                point == path or point.startswith(path + "/") for path in skipped
            ):
                points.append(point)
    return sorted(set(points), key=lambda point: point.count("/"))


def build_dev(root: str, devices: list[str]) -> None:
    """A minimal /dev: the usual nodes, a shared memory of its own, and the granted devices."""
    dev = f"{root}/dev"
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=0755")
    for name in (*DEVICES, *devices):
        if os.path.exists(f"/dev/{name}"):
            os.makedirs(os.path.dirname(f"{dev}/{name}"), exist_ok=True)
            open(f"{dev}/{name}", "w").close()
            bind(f"/dev/{name}", f"{dev}/{name}")
    os.mkdir(f"{dev}/shm")
    mount("tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    os.mkdir(f"{dev}/pts")
    mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666")
    os.symlink("pts/ptmx", f"{dev}/ptmx")
    os.symlink("/proc/self/fd", f"{dev}/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{dev}/{name}")


def place(root: str, entry: dict[str, Any]) -> None:
    """Binds one volume at its mount path, which is made if the image lacks it."""
    # The container's root mirrors the machine's, so symbolic links resolve alike in both.
    target = root + os.path.realpath(entry["target"])
    if os.path.isdir(entry["source"]):
        place_folder(root, os.path.realpath(entry["target"]))
    elif not os.path.exists(target):
        place_folder(root, os.path.dirname(os.path.realpath(entry["target"])))
        open(target, "w").close()
    bind(entry["source"], target, read_only=entry["read_only"])


def place_folder(root: str, path: str) -> None:
    try:
        os.makedirs(root + path, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the mount point {path}: {error.strerror}") from None


def enter_root(root: str) -> None:
    """Makes `root` this process's /, and lets go of the machine's."""
    os.chdir(root)
    check(_libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


# -- the container's process ----------------------------------------------------------------


def container_main(
    config: dict[str, Any], scratch: str, out: int, err: int, status: int
) -> NoReturn:
    """PID 1 of the container: sets up, then becomes the container's program.

    `status` is closed by a successful exec; otherwise it carries the reason.
    """
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        for cgroup in config["cgroups"]:
            with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as procs:
                procs.write("0")
        unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
        name = config["hostname"].encode()
        check(_libc.sethostname(name, len(name)), "sethostname")
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
        code = "executable file not found in $PATH" if error.errno == errno.ENOENT else str(error)
        raise SetupError(f'exec: "{argv[0]}": {code}') from None


def describe(error: BaseException) -> str:
    """One sentence for an expected failure, a traceback for a bug."""
    if isinstance(error, SetupError):
        return str(error)
    return "".join(traceback.format_exception(error))


def map_root() -> None:
    """Without root: a user namespace in which this user is root."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


# -- the shim itself ------------------------------------------------------------------------


class LogWriter:
    """Writes a container's output as CRI log records: TIME STREAM TAG TEXT."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._pending = {"stdout": b"", "stderr": b""}

    def feed(self, stream: str, data: bytes) -> None:
        """Takes what was read from a stream; whole lines are written at once."""
        *lines, rest = (self._pending[stream] + data).split(b"\n")
        records = [piece for line in lines for piece in self._records(stream, line, b"F")]
        while len(rest) >= LINE_LIMIT_BYTES:
            records += self._record(stream, rest[:LINE_LIMIT_BYTES], b"P")
            rest = rest[LINE_LIMIT_BYTES:]
        self._pending[stream] = rest
        if records:
            os.write(self._fd, b"".join(records))

    def close(self) -> None:
        """Writes what had no newline at its end."""
        for stream, rest in self._pending.items():
            if rest:
                os.write(self._fd, b"".join(self._records(stream, rest, b"P")))
        os.close(self._fd)

    def _records(self, stream: str, line: bytes, last_tag: bytes) -> list[bytes]:
        pieces = []
        while len(line) > LINE_LIMIT_BYTES:
            pieces += self._record(stream, line[:LINE_LIMIT_BYTES], b"P")
            line = line[LINE_LIMIT_BYTES:]
        return pieces + self._record(stream, line, last_tag)

    @staticmethod
    def _record(stream: str, text: bytes, tag: bytes) -> list[bytes]:
        now_ns = time.time_ns()
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 10**9))
        head = f"{seconds}.{now_ns % 10**9:09d}Z {stream} ".encode()
        return [head, tag, b" ", text, b"\n"]


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat, which with the pid names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def write_json(path: str, value: dict[str, Any]) -> None:
    """Writes all of it or nothing."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)


def run(folder: str) -> None:
    """Starts the container, reports the start on stdout, then waits for its end."""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    scratch = f"{folder}/root"
    os.makedirs(scratch, exist_ok=True)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    status_read, status_write = os.pipe()
    try:
        if config["rootless"]:
            map_root()
        unshare(CLONE_NEWPID)
    except SetupError as error:
        report({"error": str(error)})
        return
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
        report({"error": failure})
        return
    started = {
        "shim_pid": os.getpid(),
        "shim_start_ticks": start_ticks(os.getpid()),
        "pid": pid,
        "start_ticks": start_ticks(pid),
        "started_at_s": time.time(),
    }
    write_json(f"{folder}/started.json", started)
    report(started)
    copy_output(config["log"], {out_read: "stdout", err_read: "stderr"})
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    ending = {"code": code if code >= 0 else 128 - code, "signal": max(0, -code)}
    write_json(f"{folder}/exit.json", {**ending, "finished_at_s": time.time()})


def report(value: dict[str, Any]) -> None:
    """Tells the agent, then lets go of its pipe: the agent may be killed from here on."""
    os.write(1, json.dumps(value).encode() + b"\n")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def copy_output(path: str, streams: dict[int, str]) -> None:
    """Copies both streams into the log until every writer has closed them."""
    writer = LogWriter(path)
    poller = select.poll()
    for fd in streams:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        poller.register(fd, select.POLLIN)
    open_fds = set(streams)
    while open_fds:
        for fd, _ in poller.poll():
            data = os.read(fd, 65536)
            if data:
                writer.feed(streams[fd], data)
            else:
                poller.unregister(fd)
                open_fds.remove(fd)
    writer.close()


# -- exec -----------------------------------------------------------------------------------


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
        check(_libc.setns(handle, 0), f"setns({space})")
    child = os.fork()
    if child == 0:
        try:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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


def main() -> None:
    """Entry point."""
    verb, folder, *rest = sys.argv[1:]
    if verb == "run":
        run(folder)
        return
    try:
        sys.exit(execute(folder, rest[1:], tty=verb == "exec-tty"))
    except (SetupError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(126)


if __name__ == "__main__":
    main()
