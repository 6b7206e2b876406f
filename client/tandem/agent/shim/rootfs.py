"""A container's filesystem: the machine's files under private writable layers, with volumes.

Each filesystem of the machine is shown through an overlay with a writable layer in memory: what a
container writes outside its volumes is its own and gone with it, as with an image. Folders that it
must not share with the machine are fresh and empty. Runs in the container's own mount namespace.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Final

from tandem.agent.shim.kernel import (
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    SetupError,
    bind,
    mount,
    pivot_root,
)

DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
KERNEL_FOLDERS: Final = ("/proc", "/sys", "/dev")


def build_root(config: dict[str, Any], scratch: str) -> str:
    """Assembles the container's root below `scratch` and returns it. In the new namespaces."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mirror = Mirror(scratch, mount_points(), rootless=config["rootless"])
    mount("tmpfs", scratch, "tmpfs", 0, "mode=0755")
    root = f"{scratch}/root"
    os.mkdir(root)
    bind(root, root)  # pivot_root wants a mount, and without root the mirror is none.
    mirror.show("/", root)
    for folder in KERNEL_FOLDERS:
        place_folder(root, folder)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    bind("/sys", f"{root}/sys", read_only=True)
    build_dev(root, config["devices"])
    for folder in sorted(config["private"]):  # Outer ones first: one may lie in another.
        place_folder(root, folder)
        mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for path in config["image_paths"]:
        place_folder(root, path)
        bind(path, root + path, read_only=True)
    for entry in config["mounts"]:
        place(root, entry)
    if config["read_only_root"]:
        mount("", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY)
    return root


class Mirror:
    """Shows the machine's filesystems under writable layers of the container's own.

    One overlay for each filesystem. Without root the kernel refuses an overlay of a folder that has
    other filesystems mounted below it; such a folder is made anew, entry by entry.
    """

    def __init__(self, scratch: str, points: list[str], *, rootless: bool) -> None:
        self._scratch = scratch
        self._points = points
        self._options = ",userxattr" if rootless else ""
        self._count = 0

    def show(self, source: str, target: str) -> None:
        """Makes `source`, with all that is mounted below it, appear at `target`."""
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif not os.path.isdir(source):
            if not os.path.lexists(target):
                open(target, "w").close()
            bind(source, target)
        else:
            os.makedirs(target, exist_ok=True)
            self._show_folder(source, target)

    def _show_folder(self, source: str, target: str) -> None:
        below = self._mounted_below(source)
        if self._overlay(source, target):
            for point in below:
                self._show_if_possible(point, target + point[len(source.rstrip("/")) :])
        elif below:
            os.chmod(target, os.stat(source).st_mode & 0o7777)
            for name in os.listdir(source):
                path = os.path.join(source, name)
                if path not in KERNEL_FOLDERS:
                    self._show_if_possible(path, f"{target}/{name}")
        else:
            # Not every filesystem can be under an overlay: then it is shown as it is.
            bind(source, target, read_only=True)

    def _show_if_possible(self, source: str, target: str) -> None:
        # A filesystem of another user (FUSE) may refuse even root: the container lacks it then.
        with contextlib.suppress(OSError, SetupError):
            self.show(source, target)

    def _mounted_below(self, folder: str) -> list[str]:
        """The outermost mount points strictly below a folder."""
        prefix = folder.rstrip("/") + "/"
        below = sorted(point for point in self._points if point.startswith(prefix))
        return [p for p in below if not any(p.startswith(o + "/") for o in below)]

    def _overlay(self, source: str, target: str) -> bool:
        self._count += 1
        upper, work = (f"{self._scratch}/{kind}-{self._count}" for kind in ("upper", "work"))
        os.mkdir(upper)
        os.mkdir(work)
        os.chmod(upper, os.stat(source).st_mode & 0o7777)
        options = f"lowerdir={source},upperdir={upper},workdir={work}{self._options}"
        try:
            mount("overlay", target, "overlay", 0, options)
        except SetupError:
            return False
        return True


def mount_points() -> list[str]:
    """Where the machine has filesystems, apart from its root and the kernel's own."""
    points = set()
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        for line in table:
            point = line.split()[4].encode().decode("unicode_escape")
            if not any(point == path or point.startswith(path + "/") for path in KERNEL_FOLDERS):
                points.add(point)
    return sorted(points - {"/"})


def build_dev(root: str, devices: list[str]) -> None:
    """A minimal /dev: the usual nodes, a shared memory of its own, and the granted devices."""
    dev = f"{root}/dev"
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=0755")
    for name in (*DEVICES, *devices):
        if os.path.isdir(f"/dev/{name}"):
            os.mkdir(f"{dev}/{name}")
        elif os.path.exists(f"/dev/{name}"):
            open(f"{dev}/{name}", "w").close()
        else:
            continue
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
    """Makes `root` this process's /."""
    os.chdir(root)
    pivot_root()
    os.chdir("/")
