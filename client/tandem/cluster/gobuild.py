"""Building programs from Go modules of ours, once for each version of their inputs.

The result is cached outside the tree under a hash of everything that goes into it. A build works
in a folder of its own that is renamed when it is whole, under a lock, so that two processes that
need the same program at once build it once.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.cluster.paths import cache_home
from tandem.cluster.pins import Version

NOTE_PERIOD_S: Final = 5.0


class BuildError(RuntimeError):
    """The build is impossible or failed; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Program:
    """A main package of a Go module of ours."""

    name: str
    """Of the binary, and of its folder in the cache."""
    module: Path
    """The folder of its go.mod."""
    sources: tuple[str, ...]
    """The files of that folder that go into it."""
    package: str
    tags: str
    linker_flags: str
    announcement: str
    """What is built and what it takes, for who waits."""
    instead: str
    """What helps whoever has no Go toolchain, as the end of a sentence: "or ..."."""
    links: tuple[str, ...] = ()
    """Other names of the binary, beside it."""

    def cache_key(self, go_version: str) -> str:
        """A name for the result: equal exactly when nothing that goes into it differs."""
        digest = hashlib.sha256()
        parts = [(self.module / name).read_bytes() for name in self.sources]
        parts += [text.encode() for text in (self.linker_flags, self.tags, go_version)]
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()[:16]

    def cached(self) -> Path | None:
        """The folder of an earlier build of the same inputs."""
        try:
            folder = self._folder(self._go())
        except BuildError:
            return None
        return folder if (folder / self.name).exists() else None

    def build(self, note: Callable[[str], None]) -> Path:
        """Builds, or waits for the build of somebody else; returns the folder of the binary.

        Raises:
            BuildError: no Go toolchain, an old one, or a failed build.
        """
        go = self._go()
        folder = self._folder(go)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), self.name, note):
            if not (folder / self.name).exists():
                self._build(go, folder, note)
        return folder

    def _folder(self, go: str) -> Path:
        return cache_home(self.name) / self.cache_key(self._go_version(go))

    def _build(self, go: str, folder: Path, note: Callable[[str], None]) -> None:
        note(self.announcement)
        begun_s = time.monotonic()
        what = ["-tags", self.tags, self.package]
        listing = self._run(go, ["list", "-deps", *what], "downloading modules", note)
        total = len(listing.splitlines())
        draft = Path(tempfile.mkdtemp(prefix="build-", dir=folder.parent))
        try:
            flags = ["-trimpath", "-ldflags", self.linker_flags, "-o", str(draft / self.name)]
            self._compile(go, ["build", "-v", *flags, *what], total, begun_s, note)
            for name in self.links:
                (draft / name).symlink_to(self.name)
            draft.chmod(0o755)
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        note(f"built in {time.monotonic() - begun_s:.0f} s: {folder}")

    def _compile(
        self,
        go: str,
        arguments: list[str],
        total: int,
        begun_s: float,
        note: Callable[[str], None],
    ) -> None:
        """Runs `go build -v`, which names each package that it compiles on a line of its own."""
        process = subprocess.Popen(
            [go, *arguments],
            cwd=self.module,
            env=_environment(),
            stderr=subprocess.PIPE,
            text=True,
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
                    note(
                        f"compiled {compiled} packages of at most {total}, {now_s - begun_s:.0f} s"
                    )
        if process.wait() != 0:
            raise BuildError("go build failed:\n" + "".join(tail).strip())

    def _run(self, go: str, arguments: list[str], doing: str, note: Callable[[str], None]) -> str:
        note(f"{doing} ...")
        answer = subprocess.run(
            [go, *arguments], cwd=self.module, env=_environment(), capture_output=True, text=True
        )
        if answer.returncode != 0:
            raise BuildError(f"{doing} failed: {answer.stderr.strip()[-1000:]}")
        return answer.stdout

    def _go(self) -> str:
        go = shutil.which("go")
        if go is None:
            raise BuildError(
                f"there is no Go toolchain to build {self.name} with: install Go "
                f"{self._wanted_go()} or newer (https://go.dev/dl), {self.instead}"
            )
        return go

    def _go_version(self, go: str) -> str:
        """The version of the toolchain that will build the module (GOTOOLCHAIN may fetch a newer).

        Raises:
            BuildError: it is too old for the module.
        """
        answer = subprocess.run(
            [go, "env", "GOVERSION"],
            cwd=self.module,
            env=_environment(),
            capture_output=True,
            text=True,
        )
        version = answer.stdout.strip()
        if answer.returncode != 0 or not version:
            raise BuildError(f"{go} cannot build it: {answer.stderr.strip()[-500:]}")
        found, wanted = Version.find(version), Version.find(self._wanted_go())
        if found is None or wanted is None or found < wanted:
            raise BuildError(f"{go} is {version}, but Go {self._wanted_go()} or newer is wanted")
        return version

    def _wanted_go(self) -> str:
        lines = (self.module / "go.mod").read_text().splitlines()
        return next(line.removeprefix("go ") for line in lines if line.startswith("go "))


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}


@contextmanager
def _locked(path: Path, name: str, note: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another process builds {name}: waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
