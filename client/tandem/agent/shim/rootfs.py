"""A container's filesystem: the machine's root under a private writable layer, with volumes.

What a container writes outside its volumes is gone with it, as with an image; folders that it must
not share with the machine are fresh and empty. Runs in the container's own mount namespace.
"""

from __future__ import annotations

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
    """Makes `root` this process's /."""
    os.chdir(root)
    pivot_root()
    os.chdir("/")
