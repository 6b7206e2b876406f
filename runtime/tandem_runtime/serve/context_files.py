"""Contexts as files beside the disk tier, so that a pod that was killed keeps what it kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from tandem_runtime.protocol import Context

log = logging.getLogger(__name__)

_SUFFIX: Final = ".context"


class ContextFiles:
    """One file for each context: a checksum, a line feed, JSON. Pods may share the folder: what two
    of them write of one context is the same, and the newer version of one is the one that counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> list[Context]:
        """Those that are whole; others are logged, and stay for whoever can read them."""
        found = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                found.append(_decoded(path.read_bytes()))
            except (OSError, ValueError) as error:
                log.warning("the context in %s is ignored: %s", path, error)
        return found

    def save(self, context: Context) -> None:
        """Atomic and synced. What cannot be written is logged: the context lives in memory then."""
        body = msgspec.json.encode(context)
        path = self._path(context.id)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with os.fdopen(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb"
            ) as file:
                file.write(xxhash.xxh3_64_hexdigest(body).encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            log.warning("the context %s cannot be written: %s", context.id, error)

    def remove(self, id_: str) -> None:
        try:
            self._path(id_).unlink(missing_ok=True)
        except OSError as error:
            log.warning("the context %s cannot be removed: %s", id_, error)

    def _path(self, id_: str) -> Path:
        return self._folder / f"{id_}{_SUFFIX}"


def _decoded(data: bytes) -> Context:
    checksum, _, body = data.partition(b"\n")
    if checksum != xxhash.xxh3_64_hexdigest(body).encode():
        raise ValueError("it is damaged")
    return msgspec.json.decode(body, type=Context)
