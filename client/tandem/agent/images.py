"""Which images this node "has": the project's own, which are its virtual environment.

A container runs on the machine's root filesystem with the environment's `bin` first in PATH, so
`tandem.dev/runtime:0.1.0` here and the image of that name on a real cluster run the same files.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.agent.store import Mount
from tandem.cluster.paths import cache_home

REGISTRY: Final = "tandem.dev/"
ENTRYPOINTS: Final[dict[str, tuple[str, ...]]] = {
    "operator": ("python", "-m", "tandem_operator"),
    "runtime": (),
}
BYTECODE_PATH: Final = "/var/cache/tandem-bytecode"
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here."""

    name: str
    entrypoint: tuple[str, ...]
    env: dict[str, str]
    paths: list[str]
    """The folders that its programs are in."""
    caches: list[Mount]
    """Folders that its containers share and may write: compiled bytecode, nothing else."""


@dataclass(frozen=True, slots=True)
class NoImage:
    """Why an image is not here, in one sentence."""

    sentence: str


def image_id(name: str) -> str:
    """What status.containerStatuses[].imageID says of an image that ran."""
    return f"tandem://{name}"


def find_image(name: str) -> Image | NoImage:
    """Looks an image up by the name in the pod's spec."""
    version = importlib.metadata.version("tandem")
    here = ", ".join(f"{REGISTRY}{image}:{version}" for image in ENTRYPOINTS)
    repository, _, tag = name.removeprefix(REGISTRY).partition(":")
    if not name.startswith(REGISTRY) or repository not in ENTRYPOINTS:
        return NoImage(
            f'image "{name}" is not on this node and nothing is pulled: '
            f"a local cluster runs {here} only"
        )
    if tag != version:
        return NoImage(f'image "{name}" has another version than this node: it has {here}')
    return Image(
        name,
        ENTRYPOINTS[repository],
        {
            "PATH": f"{Path(sys.prefix) / 'bin'}:{SYSTEM_PATH}",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPYCACHEPREFIX": BYTECODE_PATH,
        },
        image_paths(),
        [Mount(str(bytecode_cache()), BYTECODE_PATH)],
    )


def image_paths() -> list[str]:
    """The virtual environment, the Python below it, and this source tree."""
    source = Path(__file__).resolve().parents[3]
    return sorted({sys.prefix, sys.base_prefix, os.fspath(source)})


def bytecode_cache() -> Path:
    """Where Python keeps what it compiled: an image's files are read-only, and compiling torch
    anew in each container would take seconds of every start."""
    folder = cache_home().parent / "bytecode"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
