"""Building the control plane from our Go module, once for each version of its inputs.

The result is cached outside the tree under a hash of everything that goes into it. A build works
in a folder of its own that is renamed when it is whole, under a lock, so that two clusters that
start at once build once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tandem.cluster.paths import cache_home
from tandem.cluster.pins import MODULE, SERVERS, Pins, Version

SOURCES: Final = ("go.mod", "go.sum", "main.go")
TAGS: Final = "notest,grpcnotrace"
NOTE_PERIOD_S: Final = 5.0


class BuildError(RuntimeError):
    """The build is impossible or failed; the message says why and what would help."""


def linker_flags(version: Version) -> str:
    """Flags that make the binaries tell their version, as the official build does."""
    fields = {
        "gitVersion": f"v{version}",
        "gitMajor": str(version.major),
        "gitMinor": str(version.minor),
        "gitTreeState": "clean",
        "gitCommit": "unknown",
        "buildDate": "2026-01-01T00:00:00Z",
    }
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    sets = [f"-X {package}.{key}={value}" for package in packages for key, value in fields.items()]
    return " ".join(["-s", "-w", *sets])


def cache_key(go_version: str, module: Path = MODULE) -> str:
    """A name for the result: equal exactly when nothing that goes into it differs."""
    digest = hashlib.sha256()
    parts = [(module / name).read_bytes() for name in SOURCES]
    parts += [
        linker_flags(Pins.read(module).kubernetes).encode(),
        TAGS.encode(),
        go_version.encode(),
    ]
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


def cached() -> Path | None:
    """The folder of an earlier build of the same inputs."""
    try:
        folder = cache_home() / cache_key(_go_version(_go()))
    except BuildError:
        return None
    return folder if (folder / SERVERS[0]).exists() else None


def build(note: Callable[[str], None]) -> Path:
    """Builds, or waits for the build of somebody else; returns the folder of the binaries.

    Raises:
        BuildError: no Go toolchain, an old one, or a failed build.
    """
    go = _go()
    folder = cache_home() / cache_key(_go_version(go))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock"), note):
        if not (folder / SERVERS[0]).exists():
            _build(go, folder, note)
    return folder


def _build(go: str, folder: Path, note: Callable[[str], None]) -> None:
    note(
        "building etcd and Kubernetes from source, once for this machine: about 6 minutes on 2 "
        "cores, 3 GB of memory, 4 GB of Go's caches"
    )
    begun_s = time.monotonic()
    _run(go, ["mod", "download"], "downloading modules", note)
    listing = _run(go, ["list", "-deps", "-tags", TAGS, "."], "listing packages", note)
    total = len(listing.splitlines())
    draft = Path(tempfile.mkdtemp(prefix="build-", dir=folder.parent))
    try:
        flags = ["-trimpath", "-tags", TAGS, "-ldflags", linker_flags(Pins.read().kubernetes)]
        output = ["-o", str(draft / "controlplane")]
        _compile(go, ["build", "-v", *flags, *output, "."], total, begun_s, note)
        for name in SERVERS:
            (draft / name).symlink_to("controlplane")
        draft.chmod(0o755)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    note(f"built in {time.monotonic() - begun_s:.0f} s: {folder}")


def _compile(
    go: str, arguments: list[str], total: int, begun_s: float, note: Callable[[str], None]
) -> None:
    """Runs `go build -v`, which names each package that it compiles on a line of its own."""
    process = subprocess.Popen(
        [go, *arguments], cwd=MODULE, env=_environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    compiled, tail, noted_s = 0, [""], begun_s
    with process.stderr as lines:
        for line in lines:
            compiled += 1
            tail = [*tail[-20:], line]
            now_s = time.monotonic()
            if now_s - noted_s >= NOTE_PERIOD_S:
                noted_s = now_s
                note(f"compiled {compiled} packages of at most {total}, {now_s - begun_s:.0f} s")
    if process.wait() != 0:
        raise BuildError("go build failed:\n" + "".join(tail).strip())


def _run(go: str, arguments: list[str], doing: str, note: Callable[[str], None]) -> str:
    note(f"{doing} ...")
    answer = subprocess.run(
        [go, *arguments], cwd=MODULE, env=_environment(), capture_output=True, text=True
    )
    if answer.returncode != 0:
        raise BuildError(f"{doing} failed: {answer.stderr.strip()[-1000:]}")
    return answer.stdout


def _go() -> str:
    go = shutil.which("go")
    if go is None:
        raise BuildError(
            "there is no Go toolchain to build it with: install Go "
            f"{_wanted_go()} or newer (https://go.dev/dl), or set KUBEBUILDER_ASSETS to a folder "
            f"with {', '.join(SERVERS)} of Kubernetes {Pins.read().describe('kube-apiserver')}"
        )
    return go


def _go_version(go: str) -> str:
    """The version of the toolchain that will build the module (GOTOOLCHAIN may fetch a newer).

    Raises:
        BuildError: it is too old for the module.
    """
    answer = subprocess.run(
        [go, "env", "GOVERSION"], cwd=MODULE, env=_environment(), capture_output=True, text=True
    )
    version = answer.stdout.strip()
    if answer.returncode != 0 or not version:
        raise BuildError(f"{go} cannot build it: {answer.stderr.strip()[-500:]}")
    found, wanted = Version.find(version), Version.find(_wanted_go())
    if found is None or wanted is None or found < wanted:
        raise BuildError(f"{go} is {version}, but Go {_wanted_go()} or newer is wanted")
    return version


def _wanted_go() -> str:
    lines = (MODULE / "go.mod").read_text().splitlines()
    return next(line.removeprefix("go ") for line in lines if line.startswith("go "))


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}


@contextmanager
def _locked(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("another process builds the control plane: waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
