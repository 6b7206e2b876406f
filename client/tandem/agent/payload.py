"""Volumes made of small files: what is in them (pure), and writing them so that readers never see
a mixture of old and new.

The files live in a timestamped folder; `..data` is a symbolic link to it and every name at the top
is a symbolic link through `..data`. Replacing that one link replaces everything at once: the layout
of a kubelet, which programs that watch `..data` rely on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

DATA_LINK: Final = "..data"
DEFAULT_MODE: Final = 0o644


class MissingKeyError(Exception):
    """An item names a key that the object does not have."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a volume."""

    data: bytes
    mode: int = DEFAULT_MODE


Payload: TypeAlias = dict[str, File]
"""Relative path to file."""


def project(
    data: Mapping[str, bytes],
    items: Sequence[Mapping[str, Any]] | None,
    mode: int,
    *,
    optional: bool,
    what: str,
) -> Payload:
    """The files of a ConfigMap or Secret: all keys, or the listed ones under their paths.

    Raises:
        MissingKeyError: a listed key is absent and the source is not optional.
    """
    if not items:
        return {key: File(value, mode) for key, value in data.items()}
    files = {}
    for item in items:
        if item["key"] in data:
            files[item["path"]] = File(data[item["key"]], item.get("mode") or mode)
        elif not optional:
            raise MissingKeyError(f"{what} references non-existent key: {item['key']}")
    return files


def write(folder: Path, payload: Payload) -> bool:
    """Makes `folder` hold exactly `payload`; False when it did already."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / DATA_LINK
    if link.is_symlink() and _read(link) == payload:
        return False
    fresh = Path(tempfile.mkdtemp(prefix="..", dir=folder))
    fresh.chmod(0o755)
    for name, file in payload.items():
        path = fresh / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
        path.chmod(file.mode)
    old = folder / os.readlink(link) if link.is_symlink() else None
    draft = folder / "..data_tmp"
    draft.unlink(missing_ok=True)
    draft.symlink_to(fresh.name)
    draft.replace(link)
    _link_names(folder, {name.split("/", 1)[0] for name in payload})
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return True


def _link_names(folder: Path, names: set[str]) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink() and entry.name != DATA_LINK and entry.name not in names:
            entry.unlink()
    for name in names:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"{DATA_LINK}/{name}")


def _read(folder: Path) -> Payload:
    return {
        str(path.relative_to(folder)): File(path.read_bytes(), path.stat().st_mode & 0o7777)
        for path in folder.rglob("*")
        if path.is_file()
    }
