"""How every benchmark ends: a readable table, then one JSON line with its targets.

The JSON is also written to benchmarks/results/NAME.json, with the hardware and the versions that
produced it, so that a figure can always be traced to a machine.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

RESULTS: Final = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Target:
    """A claim with its figure. `bound` None: a baseline that claims nothing."""

    name: str
    value: float
    bound: float | None
    sense: Literal["at most", "at least"] = "at most"

    @property
    def holds(self) -> bool | None:
        """Whether the figure keeps the bound; None for a baseline."""
        if self.bound is None:
            return None
        return self.value <= self.bound if self.sense == "at most" else self.value >= self.bound

    def as_json(self) -> dict[str, Any]:
        """The form that the last line of a benchmark's output carries."""
        return {**asdict(self), "holds": self.holds}


def hardware() -> dict[str, Any]:
    """The machine that measured."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _gpu_model() -> str | None:
    path = Path("/proc/driver/nvidia/gpus")
    if not path.is_dir():
        return None
    for information in path.glob("*/information"):
        for line in information.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that matter for a result."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def finish(
    name: str,
    targets: Sequence[Target],
    results: Mapping[str, Any],
    packages: Sequence[str] = (),
    *,
    save: bool = True,
) -> None:
    """Write the result file and print the JSON object as the last line."""
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions("tandem", *packages),
        "targets": [target.as_json() for target in targets],
        "results": results,
    }
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document), flush=True)
