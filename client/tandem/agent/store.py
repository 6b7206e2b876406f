"""What an agent keeps on disk, so that its successor can take over where a SIGKILL left off.

    FOLDER/pods/UID/pod.json                       the pod as last seen, its address, its GPUs
    FOLDER/pods/UID/volumes/NAME/                  volumes that live as long as the pod
    FOLDER/pods/UID/containers/NAME/N/             run N: config.json, started.json, exit.json
    FOLDER/pods/UID/containers/NAME/N.log          its output

Files appear whole or not at all. Only the newest two runs of a container are kept.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tandem.cluster.process import ProcessId

KEPT_RUNS: Final = 2


@dataclass(frozen=True, slots=True)
class Mount:
    """One entry of a container's mounts: `source` on the machine appears at `target`."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """What the shim runs; `config.json`."""

    argv: list[str]
    env: dict[str, str]
    working_dir: str
    hostname: str
    log: str
    mounts: list[Mount]
    private: list[str]
    """Folders that the container must not share with the machine; fresh and empty in it."""
    image_paths: list[str]
    """Folders that the program itself is in: visible even below a private one."""
    devices: list[str]
    """Names below /dev, beside the usual ones."""
    cgroups: list[str]
    read_only_root: bool
    rootless: bool
    strikes: int
    """Restarts in a row before this run; `backoff.delay_s` follows from it."""
    termination_log: str
    """Where, on the machine, the container's termination message arrives."""


@dataclass(frozen=True, slots=True)
class Started:
    """A run that began; `started.json`."""

    shim: ProcessId
    process: ProcessId
    started_at_s: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Started:
        """From what the shim wrote."""
        return cls(
            ProcessId(data["shim_pid"], data["shim_start_ticks"]),
            ProcessId(data["pid"], data["start_ticks"]),
            data["started_at_s"],
        )


@dataclass(frozen=True, slots=True)
class Ending:
    """A run that ended; `exit.json`."""

    code: int
    signal: int
    finished_at_s: float


@dataclass(frozen=True, slots=True)
class RunDir:
    """The folder of one run of one container."""

    path: Path

    @property
    def number(self) -> int:
        """0 for the first run."""
        return int(self.path.name)

    @property
    def log(self) -> Path:
        """The run's output, in CRI format."""
        return self.path.parent / f"{self.path.name}.log"

    def write_config(self, config: ContainerConfig) -> None:
        """Makes the folder and what the shim needs in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", dataclasses.asdict(config))

    def read_config(self) -> ContainerConfig | None:
        """What the shim was told; None when the run never came that far."""
        data = read_json(self.path / "config.json")
        if data is None:
            return None
        mounts = [Mount(**mount) for mount in data.pop("mounts")]
        return ContainerConfig(**data, mounts=mounts)

    def started(self) -> Started | None:
        """The run's processes; None when it never started."""
        data = read_json(self.path / "started.json")
        return None if data is None else Started.from_dict(data)

    def ending(self) -> Ending | None:
        """How the run ended; None while it runs (or when its shim was killed)."""
        data = read_json(self.path / "exit.json")
        return None if data is None else Ending(**data)

    def write_ending(self, ending: Ending) -> None:
        """Records an end that no shim could."""
        write_json(self.path / "exit.json", dataclasses.asdict(ending))


@dataclass(frozen=True, slots=True)
class PodRecord:
    """`pod.json`."""

    pod: dict[str, Any]
    ip: str
    gpus: dict[str, list[int]]
    """Container name to the indices of its GPUs."""
    begun_at_s: float
    """When the node took the pod on."""


@dataclass(frozen=True, slots=True)
class PodDir:
    """The folder of one pod."""

    path: Path

    @property
    def uid(self) -> str:
        """The pod's uid."""
        return self.path.name

    def volume(self, name: str) -> Path:
        """The folder of a volume."""
        return self.path / "volumes" / name

    def write(self, record: PodRecord) -> None:
        """Makes the folder and its record."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "pod.json", dataclasses.asdict(record))

    def read(self) -> PodRecord | None:
        """The record; None when the folder is of no use."""
        data = read_json(self.path / "pod.json")
        return None if data is None else PodRecord(**data)

    def run(self, container: str, number: int) -> RunDir:
        """The folder of run `number` of a container."""
        return RunDir(self.path / "containers" / container / str(number))

    def runs(self, container: str) -> list[RunDir]:
        """The container's kept runs, oldest first."""
        folder = self.path / "containers" / container
        if not folder.is_dir():
            return []
        runs = [RunDir(entry) for entry in folder.iterdir() if entry.is_dir()]
        return sorted(runs, key=lambda run: run.number)

    def all_runs(self) -> list[RunDir]:
        """Every kept run of every container."""
        folder = self.path / "containers"
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return [run for name in names for run in self.runs(name)]

    def prune(self, container: str) -> None:
        """Removes all but the newest runs of a container."""
        for run in self.runs(container)[:-KEPT_RUNS]:
            run.log.unlink(missing_ok=True)
            shutil.rmtree(run.path, ignore_errors=True)

    def remove(self) -> None:
        """Removes the pod's folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of one node."""

    folder: Path

    def pod(self, uid: str) -> PodDir:
        """The folder of the pod with `uid`."""
        return PodDir(self.folder / "pods" / uid)

    def pods(self) -> list[PodDir]:
        """The folders of all pods."""
        root = self.folder / "pods"
        return [PodDir(entry) for entry in sorted(root.iterdir())] if root.is_dir() else []


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes all of it or nothing."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value))
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is no such file."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return data
