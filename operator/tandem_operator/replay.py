"""`python -m tandem_operator.replay LOG`: decide a log's scaling decisions again, and compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tandem_operator.plan.scaling.record import replay


def differences(lines: Iterable[str]) -> tuple[int, list[str]]:
    """How many looks the lines hold, and a sentence for each that is decided differently now."""
    looks, found = 0, []
    for number, text in enumerate(lines, 1):
        replayed = replay(text)
        if replayed is None:
            continue
        looks += 1
        if not replayed.same:
            found.append(
                f"line {number}, {replayed.fleet}: logged {dict(replayed.logged)}, "
                f"decided now {dict(replayed.decided)}"
            )
    return looks, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 when a decision differs, 2 when there is none in the log."""
    parser = argparse.ArgumentParser(prog="python -m tandem_operator.replay", description=__doc__)
    parser.add_argument("log", type=Path, help="the operator's output, a JSON object a line")
    options = parser.parse_args(arguments)
    with options.log.open() as lines:
        looks, found = differences(lines)
    if not looks:
        print(f"{options.log} holds no scaling decision", file=sys.stderr)
        return 2
    for sentence in found:
        print(sentence)
    print(f"{looks} looks replayed, {len(found)} decided differently")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
