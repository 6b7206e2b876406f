"""What clients notice of failures, beside the same fleet without resumption and migration.

    .venv/bin/python -m benchmarks.failures [--dtype float32] [--fault NAME ...] [--clients 32]

A local cluster with a fleet of two prefill and two decode pods, SmolLM2-135M. While clients stream
answers of 128 tokens through the fleet's gateways, one thing after the other fails. A client asks
the same question again and again, so that every answer can be compared with that of the undisturbed
run: tokens and log probabilities, which are equal to the bit in `deterministic` mode (the CPU's).

At the same time a third as many clients stream through another gateway, over the same pods, that
neither resumes streams nor moves them: the ratio of failed answers is what those are worth. Clients
of a gateway that is killed lose their connections, and come back to another one for the rest. As
many plain ones do not: theirs are counted apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.failures.clients import OUTPUT_TOKENS, Answer, Clients
from benchmarks.failures.faults import FAULTS, Fault
from benchmarks.failures.scene import SYSTEM, Scene, plain_gateway
from benchmarks.fleet import cluster, note, serve
from benchmarks.report import Target, finish

PREFILL: Final = 2
DECODE: Final = 2
STREAMING_S: Final = 240.0


@dataclass
class Seen:
    """What one group of clients saw of one fault."""

    answers: list[Answer]
    expected: dict[int, Answer]
    failures: list[Answer] = field(init=False)
    wrong: list[Answer] = field(init=False)
    """Lost, repeated or other tokens than undisturbed; of a failed answer, in what came of it."""

    def __post_init__(self) -> None:
        self.failures = [one for one in self.answers if one.error]
        self.wrong = [one for one in self.answers if not self._right(one)]

    def _right(self, answer: Answer) -> bool:
        whole = self.expected[answer.client].tokens
        return answer.tokens == (whole[: len(answer.tokens)] if answer.error else whole)

    @property
    def failed_share(self) -> float:
        return len(self.failures) / len(self.answers)

    @property
    def longest_gaps_s(self) -> list[float]:
        """Of the answers that came whole; sorted, [0] where none did."""
        return sorted(one.longest_gap_s for one in self.answers if not one.error) or [0.0]

    def as_json(self) -> dict[str, Any]:
        gaps_s = self.longest_gaps_s
        return {
            "answers": len(self.answers),
            "failed": len(self.failures),
            "wrong": len(self.wrong),
            "came_back": sum(one.came_back > 0 for one in self.answers),
            "longest_gap_median_s": round(median(gaps_s), 3),
            "longest_gap_s": round(gaps_s[-1], 3),
            "errors": sorted({one.error[:200] for one in self.failures})[:3],
        }


@dataclass(frozen=True)
class Row:
    """One fault."""

    fault: Fault
    ours: Seen
    plain: Seen
    lost: Seen | None
    """Plain clients of the fleet's own gateways, where the fault breaks connections."""
    full_after_s: float
    """From the fault until everything was there again; 0: nothing was missing when looked at."""

    def as_json(self) -> dict[str, Any]:
        return {
            "fault": self.fault.name,
            "breaks_connections": self.fault.breaks_connections,
            "full_capacity_after_s": round(self.full_after_s, 1),
            "tandem": self.ours.as_json(),
            "without": self.plain.as_json(),
            "plain_clients": None if self.lost is None else self.lost.as_json(),
        }


def undisturbed(url: str, model: str, numbers: Sequence[int]) -> dict[int, Answer]:
    """Each client's answer, alone with the others. Raises RuntimeError."""
    with Clients(url, model, numbers) as clients:
        pass
    failed = [answer.error for answer in clients.answers if answer.error]
    if failed:
        raise RuntimeError(f"with nothing failing, {len(failed)} answers failed: {failed[0]}")
    return {answer.client: answer for answer in clients.answers}


def play(scene: Scene, fault: Fault, plain_url: str, expected: dict[int, Answer]) -> Row:
    """One fault under load, a client for each expected answer."""
    fleet, numbers = scene.fleet, sorted(expected)
    apart = numbers[::3] if fault.breaks_connections else []
    with (
        Clients(fleet.url, fleet.model, numbers, come_back=True) as ours,
        Clients(fleet.url, fleet.model, apart) as lost,
        Clients(plain_url, fleet.model, numbers[::3]) as plain,
    ):
        deadline_s = time.monotonic() + STREAMING_S
        while not (ours.streaming and plain.streaming):
            if time.monotonic() > deadline_s:
                note("clients stream out of step: the fault comes as they are")
                break
            time.sleep(0.02)
        begun_s = time.monotonic()
        heal = fault.strike(scene)
        time.sleep(max(0.0, begun_s + fault.lasts_s - time.monotonic()))
        heal()
        full_after_s = scene.recovered_after_s(begun_s)
    return Row(
        fault,
        Seen(ours.answers, expected),
        Seen(plain.answers, expected),
        Seen(lost.answers, expected) if apart else None,
        full_after_s,
    )


def show(rows: Sequence[Row], dtype: str) -> None:
    """The table."""
    table = Table(title=f"answers of {OUTPUT_TOKENS} tokens, {dtype}: failed or wrong of all")
    for heading in ("fault", "tandem", "longest gap, s: median", "longest", "whole again, s"):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    table.add_column("without: failed", justify="right")
    for row in rows:
        ours, plain = row.ours, row.plain
        bad = f"{len(ours.failures)} failed, {len(ours.wrong)} wrong of {len(ours.answers)}"
        gaps_s = ours.longest_gaps_s
        table.add_row(
            row.fault.name,
            bad,
            f"{median(gaps_s):.2f}",
            f"{gaps_s[-1]:.2f}",
            f"{row.full_after_s:.0f}",
            f"{len(plain.failures)} of {len(plain.answers)}",
        )
    Console(width=150).print(table)


def targets_of(rows: Sequence[Row], dtype: str) -> list[Target]:
    """Nothing fails but plain clients that lose their connection; nothing is ever wrong."""
    failed = sum(len(row.ours.failures) for row in rows)
    answers = sum(len(row.ours.answers) for row in rows)
    lost = [row.lost for row in rows if row.lost is not None]
    wrong = sum(len(seen.wrong) for seen in (*(row.ours for row in rows), *lost))
    plain_failed = sum(len(row.plain.failures) for row in rows)
    plain = sum(len(row.plain.answers) for row in rows)
    found = [
        Target(f"{dtype}: requests failed", failed, 0),
        Target(f"{dtype}: answers with tokens lost, repeated or changed", wrong, 0),
        Target(f"{dtype}: share of requests failed without resumption", plain_failed / plain, None),
    ]
    if plain_failed:
        ratio = (failed / answers) / (plain_failed / plain)
        found.append(Target(f"{dtype}: failed, ratio to without resumption", round(ratio, 4), 0.01))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--fault", action="append", default=[], help="part of a name; repeatable; default: all"
    )
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.fault or any(p in f.name for p in options.fault)]
    if not chosen:
        parser.error(f"no such fault; there are: {', '.join(fault.name for fault in FAULTS)}")
    rows: list[Row] = []
    with cluster("failures") as running:
        running.kubectl(
            "set",
            "env",
            f"--namespace={SYSTEM}",
            "deployment/tandem-operator",
            "TANDEM_GATEWAY_REPLICAS=2",
        )
        fleet = serve(running, "chat", prefill=PREFILL, decode=DECODE, dtype=options.dtype)
        scene = Scene(fleet, PREFILL, DECODE)
        scene.recovered_after_s(time.monotonic())
        with plain_gateway(fleet) as plain_url:
            expected = undisturbed(fleet.url, fleet.model, range(options.clients))
            for fault in chosen:
                note(fault.name)
                rows.append(play(scene, fault, plain_url, expected))
                note(str(rows[-1].as_json()))
    show(rows, options.dtype)
    name = "failures" if options.dtype == "bfloat16" else f"failures_{options.dtype}"
    finish(
        name,
        targets_of(rows, options.dtype),
        {"dtype": options.dtype, "clients": options.clients, "faults": [r.as_json() for r in rows]},
        ("torch", "aiohttp"),
        save=len(chosen) == len(FAULTS),
    )


if __name__ == "__main__":
    main()
