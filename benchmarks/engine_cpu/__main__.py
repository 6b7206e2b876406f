"""Output tokens a second on two CPU cores, beside vLLM and llama.cpp, offline and over HTTP.

    .venv/bin/python -m benchmarks.engine_cpu [--quick] [--peers vLLM llama.cpp]

SmolLM2-135M, the same bfloat16 weights for vLLM and for this engine, llama.cpp with the Q4_1 file
that they come from; two threads each; random prompts, greedy, no prefix cache; steps of up to 512
tokens, as llama.cpp's (vLLM's own choice is larger). Every engine is a
process of its own that is warmed at every shape; then they take turns, pass by pass, and medians
count. Then where a step's time goes, and the same through a pod's HTTP with streaming.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.engine_cpu import pod, steps
from benchmarks.engine_cpu.players import STEP_TOKENS, Player, Shape, llama, tandem, vllm
from benchmarks.fleet import note
from benchmarks.report import Target, finish

SHAPES: Final = (Shape(1, 32, 128), Shape(16, 256, 128), Shape(32, 256, 128), Shape(8, 1024, 16))
ONE, SIXTEEN, MANY, LONG = SHAPES
SHORT: Final = 16
"""Output tokens of a warm-up."""
FLOORS: Final = (
    ("tandem", "vLLM", ONE, 2.0),
    ("tandem", "vLLM", SIXTEEN, 1.6),
    ("tandem", "vLLM", MANY, 1.6),
    ("tandem", "vLLM", LONG, 1.4),
    ("tandem", "llama.cpp", SIXTEEN, 4.0),
    ("tandem", "llama.cpp", MANY, 5.0),
    ("tandem int4", "llama.cpp", ONE, 1.0),
)
PEERS: Final = {"vLLM": vllm, "llama.cpp": llama}
HTTP_FLOOR: Final = 0.9
NEIGHBOUR_CEILING: Final = 2.5
"""Times as long as alone, beside one busy process (threads that spin take fifty times)."""
Rates = dict[str, dict[Shape, list[float]]]


def tokens(shape: Shape) -> int:
    """What a shape is counted in: output tokens, or all of them where prompts are what matters."""
    per_request = shape.output_tokens + (shape.prompt_tokens if shape == LONG else 0)
    return shape.requests * per_request


def plays(name: str, shape: Shape) -> bool:
    """What no target asks for would only take time: int4 is for few rows, and llama.cpp needs half
    a minute a pass for long prompts."""
    return {"tandem int4": shape == ONE, "llama.cpp": shape != LONG}.get(name, True)


def take_turns(players: list[Player], url: str, passes: int) -> Rates:
    """Tokens a second of every pass. The pod plays directly after the engine alone does."""
    rates: Rates = {name: {} for name in (*(player.name for player in players), "HTTP")}
    for number in range(passes + 1):
        for shape in SHAPES:
            warm = Shape(shape.requests, shape.prompt_tokens, SHORT)
            now, seed = (shape if number else warm), 1000 * number + shape.requests
            for player in players:
                if not plays(player.name, shape):
                    continue
                took = {player.name: player.play(now, seed)}
                if player.name == "tandem" and shape == SIXTEEN:
                    took["HTTP"] = pod.play(url, now, seed + 500)
                for name, took_s in took.items():
                    if number:
                        rates[name].setdefault(shape, []).append(tokens(shape) / took_s)
        note(f"pass {number} of {passes} is done" if number else "every engine is warm")
    return rates


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_a_neighbour(player: Player) -> float:
    """How many times as long a player takes while one core is wanted by another process, too."""
    ratios = []
    for seed in range(3):
        alone_s = player.play(SIXTEEN, 7000 + seed)
        with busy_process():
            ratios.append(player.play(SIXTEEN, 7000 + seed) / alone_s)
    return median(ratios)


def show(rates: Rates) -> None:
    """The table for people: medians, and the range of all passes."""
    table = Table(title=f"tokens/s on two cores (output; {LONG}: all)")
    table.add_column("engine")
    for shape in SHAPES:
        table.add_column(str(shape), justify="right")
    for name, of_shapes in rates.items():
        cells = []
        for shape in SHAPES:
            found = of_shapes.get(shape)
            wide = f"{median(found):.0f} ({min(found):.0f}..{max(found):.0f})" if found else ""
            cells.append(wide)
        table.add_row(name, *cells)
    Console().print(table)


def targets_of(rates: Rates) -> list[Target]:
    """Ratios of medians."""
    found = []
    for ours, theirs, shape, floor in FLOORS:
        if theirs in rates:
            value = median(rates[ours][shape]) / median(rates[theirs][shape])
            found.append(Target(f"{ours} / {theirs}, {shape}", round(value, 3), floor, "at least"))
    value = median(rates["HTTP"][SIXTEEN]) / median(rates["tandem"][SIXTEEN])
    found.append(Target(f"HTTP / offline, {SIXTEEN}", round(value, 3), HTTP_FLOOR, "at least"))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one pass; no result file")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="default: all of them")
    options = parser.parse_args()
    peers = list(PEERS) if options.peers is None else options.peers
    players = [PEERS[name]() for name in peers]
    players += [tandem("tandem"), tandem("tandem int4", weights="int4")]
    try:
        with pod.pod(f"--max-batch-tokens={STEP_TOKENS}") as serving:
            rates = take_turns(players, serving.url, 1 if options.quick else 3)
        neighbour = beside_a_neighbour(players[-2])
    finally:
        for player in players:
            player.end()
    show(rates)
    targets = [
        *targets_of(rates),
        Target("beside a busy process / alone", round(neighbour, 3), NEIGHBOUR_CEILING, "at most"),
    ]
    results: dict[str, Any] = {
        "tokens_per_s": {
            name: {str(shape): [round(rate, 1) for rate in found] for shape, found in of.items()}
            for name, of in rates.items()
        },
        "steps": steps.measure(),
    }
    save = not options.quick and len(peers) == len(PEERS)
    finish("engine_cpu", targets, results, ("torch", "numba"), save=save)


if __name__ == "__main__":
    main()
