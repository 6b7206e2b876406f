"""The system calls that Python has no name for, and a process's identity. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

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
MS_NOATIMES: Final = 0x400 | 0x800
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 2
PR_SET_PDEATHSIG: Final = 1
SYS_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}[os.uname().machine]


_libc: Final = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step before the container's own program failed; the message names the step."""


def _check(result: int, step: str) -> None:
    """Raises SetupError with the kernel's reason when a system call failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise SetupError(f"{step}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _check(
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
        kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIMES)
        mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat, which with the pid names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def pivot_root() -> None:
    """Makes the working directory this process's /, and lets go of what was / before."""
    _check(_libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")


def set_hostname(name: str) -> None:
    """Sets the host name of this process's UTS namespace."""
    data = name.encode()
    _check(_libc.sethostname(data, len(data)), "sethostname")


def set_namespace(handle: int, name: str) -> None:
    """Moves this process into the namespace behind `handle`."""
    _check(_libc.setns(handle, 0), f"setns({name})")


def die_with_parent() -> None:
    """Asks the kernel to SIGKILL this process when its parent ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def outlive_parent() -> None:
    """Takes `die_with_parent` back."""
    _libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)


def map_root() -> None:
    """Without root: a user namespace in which this user is root."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
