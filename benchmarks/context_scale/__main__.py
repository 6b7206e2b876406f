"""Measures, shows a table, and ends with one JSON line.

Bounds hold for the best run where something is computed (the machine may be busy), and for the
longest where somebody would wait for it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from benchmarks.context_scale import admission, hashing, keeping
from benchmarks.context_scale.admission import Admissions
from benchmarks.context_scale.timing import Times, times_of
from benchmarks.report import Target, finish


def show(rows: dict[str, Times]) -> None:
    table = Table(title="milliseconds")
    table.add_column("")
    for column in ("best", "median", "longest"):
        table.add_column(column, justify="right")
    for name, times in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in asdict(times).values()))
    Console().print(table)


def targets_of(
    rows: dict[str, Times], kept: dict[str, Times], page_bytes: float, found: Admissions
) -> list[Target]:
    hashed, blake = rows["hash, ids in an array"], rows["peer: blake2b in one call"]
    waits = rows["step that waits for pages"]
    return [
        Target("hash and look up 1,000,000 tokens, ms", rows["hash and look up"].best, 20),
        *(
            Target(f"look up 1,000,000 tokens, {name}, ms", rows[name].best, 1)
            for name in rows
            if name.startswith("named context")
        ),
        Target("index bytes a page", round(page_bytes, 1), 64),
        Target("hashing / one call of blake2b", round(hashed.best / blake.best, 2), None),
        *(Target(f"{name}, median, ms", times.median, 2) for name, times in kept.items()),
        Target("add a prompt of 1,000,000 tokens, longest, ms", rows["add a prompt"].longest, 2),
        Target(
            "add a prompt of 1,000,000 tokens, CPU time, longest, ms",
            rows["add, CPU time"].longest,
            2,
        ),
        Target("step that waits for pages, longest, ms", waits.longest, 2),
        Target(
            "step that waits for pages, CPU time, longest, ms", rows["step, CPU time"].longest, 2
        ),
        Target(
            "steps that wait less than 2 ms, %", round(100 * found.below_2_ms, 2), 99.9, "at least"
        ),
    ]


def main() -> None:
    """See the package."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_scale")
    parser.add_argument("--quick", action="store_true", help="no result file")
    options = parser.parse_args()
    rows, page_bytes = hashing.measure()
    kept, memory = keeping.measure()
    found = admission.measure()
    rows |= kept
    rows["add a prompt"] = times_of(found.add)
    rows["step of another stream"] = times_of(found.alone)
    rows["the same while a prompt is looked up"] = times_of(found.looked_up)
    rows["add, CPU time"] = times_of(found.add_cpu)
    rows["step that waits for pages"] = times_of(found.waits)
    rows["step, CPU time"] = times_of(found.waits_cpu)
    rows["add to first token"] = times_of(found.answered)
    show(rows)
    print(f"{len(found.waits)} steps waited for pages; kept contexts: {memory}")
    finish(
        "context_scale",
        targets_of(rows, kept, page_bytes, found),
        {
            "ms": {name: asdict(times) for name, times in rows.items()},
            "memory": memory,
            "steps_that_waited": len(found.waits),
            "load_average": os.getloadavg()[0],
        },
        packages=("numpy", "torch", "xxhash"),
        save=not options.quick,
    )


if __name__ == "__main__":
    main()
