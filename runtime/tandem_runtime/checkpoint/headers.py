"""A checkpoint of which the headers alone were fetched: enough to say what it is. No torch.

The files have their true sizes and are empty behind the header (sparse: they take no room), in a
folder that no pod serves from. What the weights are, a version in the folder says in their stead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tandem_runtime.checkpoint.digest import FULL_DIGEST_BYTES

VERSION: Final = ".version"
SMALL_BYTES = FULL_DIGEST_BYTES
"""Weights up to this size are fetched whole: their digest covers every byte."""
GGUF_HEADER_BYTES: Final = 1 << 26
"""More than a header with a vocabulary takes; there is no saying how long it is."""
MAX_HEADER_BYTES: Final = 100_000_000


def are_large(sizes: Mapping[str, int]) -> bool:
    """Whether it pays to fetch the headers of these weights alone."""
    return sum(sizes.values()) > SMALL_BYTES


def write_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> None:
    """Write the header of a file of `size` bytes, of which `read(start, end)` gives a range."""
    end = GGUF_HEADER_BYTES
    if path.suffix == ".safetensors":
        end = min(8 + int.from_bytes(read(0, 8), "little"), MAX_HEADER_BYTES)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(read(0, min(end, size)))
        file.truncate(size)
    part.rename(path)


def version_of(folder: Path) -> bytes:
    """What stands for weights that are not there; empty where they are."""
    version = folder / VERSION
    return version.read_bytes() if version.is_file() else b""
