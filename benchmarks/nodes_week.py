"""A week of 4,096 nodes with a failure every five minutes: without repair, with drains, and with
stragglers pulled out as well. The plan is the operator's own, the cluster is simulated.

    python -m benchmarks.nodes_week
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.report import Target, finish

REPAIRS: Final = ("drains", "drains and stragglers")
BELOW_SIZE: Final = 0.5
"""Of the time that pools are below their size without repair."""

Run = dict[str, Any]


def week(days: float, nodes: int, seed: int) -> dict[str, Run]:
    """What `tandem simulate-nodes` says, by policy; its table is printed."""
    with TemporaryDirectory() as folder:
        figures = Path(folder) / "nodes.json"
        command = (
            *(Path(sys.executable).with_name("tandem"), "simulate-nodes"),
            *("--nodes", str(nodes), "--failures-per-hour", f"{12 * nodes / 4096:g}"),
            *("--days", f"{days:g}", "--seed", str(seed), "--json", figures),
        )
        subprocess.run(command, check=True)
        return {run["policy"]: run for run in json.loads(figures.read_text())}


def targets(runs: dict[str, Run]) -> list[Target]:
    """Of one seed's runs."""
    found = [Target("off: attained", runs["off"]["attained"], None)]
    for name in REPAIRS:
        run, off = runs[name], runs["off"]
        share = run["short_pod_hours"] / off["short_pod_hours"]
        found += [
            Target(f"{name}: attained, ratio to off", run["attained"] / off["attained"], 1.0,
                   "at least"),
            Target(f"{name}: pool-hours below size, ratio to off", share, BELOW_SIZE),
            Target(f"{name}: serving pods taken under the floor", run["under_the_floor"], 0),
            Target(f"{name}: repairs begun over the brake", run["over_the_brake"], 0),
            Target(f"{name}: pools short of pods at the end", run["unfilled_pools"], 0),
        ]  # fmt: skip
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="A week of many failing nodes.")
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--nodes", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=1, help="the claims are made for each")
    options = parser.parse_args()
    whole = (options.days, options.nodes) == (7.0, 4096)
    by_seed = {seed: week(options.days, options.nodes, seed) for seed in range(options.seeds)}
    found = [
        Target(f"seed {seed}, {target.name}", target.value, target.bound, target.sense)
        for seed, runs in by_seed.items()
        for target in targets(runs)
    ]
    finish("nodes_week", found, {str(seed): runs for seed, runs in by_seed.items()}, save=whole)


if __name__ == "__main__":
    main()
