"""Every measured operator and step in one picture: FLOP/s over FLOP for each byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from benchmarks.gpu.ceilings import Ceilings


class Point(NamedTuple):
    """One measurement."""

    name: str
    flop: float
    moved_bytes: float
    seconds: float


@dataclass
class Points:
    """What was measured so far."""

    all: list[Point] = field(default_factory=list)

    def add(self, name: str, flop: float, moved_bytes: float, seconds: float) -> None:
        """`moved_bytes`: that must be moved at least."""
        self.all.append(Point(name, flop, moved_bytes, seconds))


def draw(points: list[Point], ceilings: Ceilings, target: Path | BinaryIO) -> None:
    """A PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.add_subplot()
    ridge = ceilings.matmul_flop_per_s / ceilings.bytes_per_s
    intensity = [p.flop / p.moved_bytes for p in points]
    left, right = min([0.1, *intensity]) / 2, 4 * max([ridge, *intensity])
    roof = [left * ceilings.bytes_per_s, ceilings.matmul_flop_per_s, ceilings.matmul_flop_per_s]
    axes.loglog([left, ridge, right], roof, color="black", label="measured ceilings")
    for kind in dict.fromkeys(p.name.partition(",")[0] for p in points):
        mine = [p for p in points if p.name.partition(",")[0] == kind]
        axes.loglog(
            [p.flop / p.moved_bytes for p in mine],
            [p.flop / p.seconds for p in mine],
            "o",
            label=kind,
        )
    axes.set_xlabel("FLOP for each byte that must be moved")
    axes.set_ylabel("FLOP/s")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(target, format="png", dpi=120)
