"""How long a stream stands still when it moves to another pod, beside computing it again there.

    .venv/bin/python -m benchmarks.migration [--quick]

SmolLM2-135M in bfloat16: two decode pods and a gateway, no cluster. Rounds of four clients with
contexts of 1,024 tokens, in the middle of whose answers one pod begins to leave: all four streams
move to the other one. Every fifth round nobody leaves: its median gap between tokens is what a
pause is measured against, its tokens are what every answer must have. A round has a `cache_salt` of
its own, so that the whole context has to go over.

Then one client with a context of 4,096 tokens, whose stream moves, or is ended by its pod and
resumed: computed again on the other one, as after a crash.

Pause: the longest gap of an answer between two chunks minus the undisturbed median gap.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Final

import httpx
import msgspec
import numpy as np
import openai
from rich.console import Console
from rich.table import Table
from tandem_runtime import contract
from tandem_runtime.contract import Role
from tandem_runtime.gateway.options import GatewayOptions
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.run import Gateway
from tandem_runtime.protocol import DrainRequest

from benchmarks.engine_cpu.pod import NAME, PodProcess, pod
from benchmarks.failures.clients import Answer, fill, prompt
from benchmarks.fleet import note
from benchmarks.report import Target, finish

SECRET: Final = b"a secret of this benchmark alone"
STREAMS: Final = 4
CONTEXT_TOKENS: Final = 1024
OUTPUT_TOKENS: Final = 160
LONG_TOKENS: Final = 4096
MOVES: Final = 100
BEGUN_TOKENS: Final = 8
"""Every client has so many before a pod begins to leave: no prompt is computed meanwhile."""
KV_BYTES: Final = 1 << 30
Pods = tuple[PodProcess, PodProcess]
Ask = Callable[[Answer, int, int, str], Any]


@dataclass
class Shown:
    """A discovery of the two pods, one of which may be leaving."""

    pods: tuple[PodView, ...] = ()
    synced: ClassVar[bool] = True
    age_s: ClassVar[float] = 0.0

    def show(self, pods: Sequence[PodProcess], leaving: int | None = None) -> None:
        self.pods = tuple(
            PodView(
                uid=one.name,
                name=one.name,
                ip="127.0.0.1",
                fleet="chat",
                role=Role.DECODE,
                revision="r1",
                served_names=(NAME,),
                created_unix_s=1.0,
                ready=True,
                leaving=number == leaving,
                http_port=int(one.url.rpartition(":")[2]),
                handoff_port=one.handoff_port,
            )
            for number, one in enumerate(pods)
        )


@contextmanager
def gateway(shown: Shown) -> Iterator[str]:
    """Its URL; it runs in a thread, with a loop of its own."""
    started, urls, loops = threading.Event(), [], []
    stopping = asyncio.Event()

    async def serve() -> None:
        options = GatewayOptions("bench", None, "127.0.0.1", 0, 0, SECRET, "gateway-0")
        serving = Gateway(options, shown)
        port, _ = await serving.start()
        urls.append(f"http://127.0.0.1:{port}")
        loops.append(asyncio.get_running_loop())
        started.set()
        await stopping.wait()
        await serving.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    # As in a gateway's own process.
    gc.collect()
    gc.freeze()
    try:
        yield urls[0]
    finally:
        loops[0].call_soon_threadsafe(stopping.set)
        thread.join()


@dataclass
class Round:
    """Some streams side by side, and how many of them moved."""

    answers: list[Answer] = field(default_factory=list)
    moved: int = 0

    def gaps_s(self) -> list[list[float]]:
        """Of each answer, between chunks, once all clients had begun."""
        begun_s = max(one.times_s[BEGUN_TOKENS] for one in self.answers)
        found = []
        for one in self.answers:
            times_s = [at_s for at_s in one.times_s if at_s >= begun_s]
            found.append([b - a for a, b in pairwise(times_s)])
        return found


@dataclass(frozen=True)
class Scene:
    """What a round is played on."""

    pods: Pods
    shown: Shown
    url: str
    api: openai.AsyncOpenAI

    def moves(self) -> int:
        """So far."""
        text = httpx.get(self.url + contract.PATH_METRICS, timeout=20).text
        head = 'tandem_gateway_migrations_total{outcome="moved"} '
        found = [line for line in text.splitlines() if line.startswith(head)]
        return int(float(found[0].rpartition(" ")[2])) if found else 0

    def tell(self, number: int, request: DrainRequest) -> None:
        """One of the pods."""
        headers = {"authorization": f"Bearer {contract.pod_token(SECRET)}"}
        url = self.pods[number].url + contract.PATH_DRAIN
        body = msgspec.json.encode(request)
        httpx.post(url, content=body, headers=headers, timeout=20).raise_for_status()


@asynccontextmanager
async def scene(pods: Pods) -> AsyncIterator[Scene]:
    """A gateway before the pods."""
    shown = Shown()
    with gateway(shown) as url:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600
        ) as api:
            shown.show(pods)
            while NAME not in (await asyncio.to_thread(httpx.get, f"{url}/v1/models")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            yield Scene(pods, shown, url, api)


async def play(
    at: Scene, salt: str, streams: int, context: int, leave: Callable[[], None] | None, first: int
) -> Round:
    """One round that begins on pod `first`; `leave` is called once every client has tokens.

    Raises:
        RuntimeError: an answer failed.
    """
    at.shown.show([at.pods[first]])
    before = at.moves()
    found = Round([Answer(number) for number in range(streams)])
    asking = [
        asyncio.create_task(
            fill(one, at.api, NAME, prompt(one.client, context), OUTPUT_TOKENS, salt)
        )
        for one in found.answers
    ]
    while any(len(one.tokens) <= BEGUN_TOKENS and not one.error for one in found.answers):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    if leave is not None:
        leave()
    await asyncio.gather(*asking)
    errors = [one.error for one in found.answers if one.error]
    if errors:
        raise RuntimeError(errors[0])
    found.moved = at.moves() - before
    return found


async def rounds_of_moves(at: Scene, moves: int) -> tuple[list[Round], list[Round]]:
    """(rounds in which all streams moved, undisturbed ones), taking turns."""
    moving: list[Round] = []
    still: list[Round] = []
    while sum(one.moved for one in moving) < moves:
        number = len(moving) + len(still)
        first = number % 2

        def leave(first: int = first) -> None:
            at.shown.show(at.pods, leaving=first)

        undisturbed = number % 5 == 0
        one = await play(
            at, f"round {number}", STREAMS, CONTEXT_TOKENS, None if undisturbed else leave, first
        )
        if not undisturbed and not one.moved:
            raise RuntimeError("no stream moved: the gateway's log above may say why")
        (still if undisturbed else moving).append(one)
        note(f"round {number}: {one.moved} moved")
    return moving, still


async def long_context(at: Scene, times: int) -> dict[str, list[Round]]:
    """One stream of LONG_TOKENS: undisturbed, moved, ended by its pod and resumed."""
    found: dict[str, list[Round]] = {"still": [], "moved": [], "resumed": []}
    for number in range(times):
        for first, how in enumerate(found):
            begins = (number + first) % 2

            def move(begins: int = begins) -> None:
                at.shown.show(at.pods, leaving=begins)

            def end(begins: int = begins) -> None:
                at.shown.show(at.pods[1 - begins : 2 - begins])
                at.tell(begins, DrainRequest("end", 0.0))

            leave = {"still": None, "moved": move, "resumed": end}[how]
            one = await play(at, f"long {number} {how}", 1, LONG_TOKENS, leave, begins)
            at.tell(begins, DrainRequest("cancel"))
            found[how].append(one)
            note(f"{LONG_TOKENS} tokens, {how}: {one.moved} moved")
    return found


def pauses_s(rounds: Sequence[Round], median_gap_s: float) -> list[float]:
    """The longest gap of every answer, over the median."""
    return [max(gaps_s) - median_gap_s for one in rounds for gaps_s in one.gaps_s()]


def median_gap_s(rounds: Sequence[Round]) -> float:
    return median(gap_s for one in rounds for gaps_s in one.gaps_s() for gap_s in gaps_s)


def wrong(rounds: Sequence[Round], expected: Round) -> int:
    """Answers whose tokens or log probabilities are not those of the undisturbed run."""
    whole = {one.client: one.tokens for one in expected.answers}
    return sum(one.tokens != whole[one.client] for r in rounds for one in r.answers)


async def measure(pods: Pods, moves: int, times: int) -> tuple[list[Target], dict[str, Any]]:
    """All of it."""
    async with scene(pods) as at:
        await play(at, "warm", STREAMS, CONTEXT_TOKENS, None, 0)
        await play(at, "warm", STREAMS, CONTEXT_TOKENS, None, 1)
        moving, still = await rounds_of_moves(at, moves)
        long = await long_context(at, times)
    gap_s, long_gap_s = median_gap_s(still), median_gap_s(long["still"])
    pauses = pauses_s(moving, gap_s)
    p99_s = float(np.percentile(pauses, 99))
    moved_s = median(pauses_s(long["moved"], long_gap_s))
    resumed_s = median(pauses_s(long["resumed"], long_gap_s))
    odd = wrong([*moving, *still], still[0])
    odd += wrong([r for rounds in long.values() for r in rounds], long["still"][0])
    targets = [
        Target("pause p99, ratio to three steps + 50 ms", p99_s / (3 * gap_s + 0.05), 1.0),
        Target(f"pause at {LONG_TOKENS} tokens, ratio to resuming", moved_s / resumed_s, 0.1),
        Target("answers with tokens lost, repeated or changed", odd, 0),
    ]
    results = {
        "moves": sum(one.moved for one in moving),
        "undisturbed_gap_ms": {"median": gap_s * 1e3, "long_median": long_gap_s * 1e3},
        "undisturbed_pause_ms": _percentiles_ms(pauses_s(still, gap_s)),
        "pause_ms": _percentiles_ms(pauses),
        "long": {
            how: [round(1e3 * s, 1) for s in pauses_s(rounds, long_gap_s)]
            for how, rounds in long.items()
        },
    }
    return targets, results


def _percentiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": round(1e3 * float(np.percentile(values_s, p)), 1) for p in (50, 90, 99, 100)}


def show(results: dict[str, Any], targets: Sequence[Target]) -> None:
    """The table."""
    table = Table(title=f"pause of a stream, ms: {STREAMS} clients, {CONTEXT_TOKENS} tokens")
    for heading in ("", "p50", "p90", "p99", "longest"):
        table.add_column(heading, justify="right")
    for name in ("undisturbed_pause_ms", "pause_ms"):
        table.add_row(name.removesuffix("_ms"), *(f"{v:.0f}" for v in results[name].values()))
    console = Console(width=120)
    console.print(table)
    for how, values in results["long"].items():
        console.print(f"{LONG_TOKENS} tokens, one stream, {how}: pauses {values} ms")
    for target in targets:
        console.print(f"{target.name}: {target.value:.3f} (at most {target.bound})")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few moves, and no result file")
    options = parser.parse_args()
    moves, times = (8, 1) if options.quick else (MOVES, 5)
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_bytes(SECRET)
        flags = (
            "--role=decode",
            f"--handoff-secret-file={secret}",
            f"--kv-cache-bytes={KV_BYTES}",
            "--threads=1",
        )
        with pod(*flags, name="a") as a, pod(*flags, name="b") as b:
            targets, results = asyncio.run(measure((a, b), moves, times))
    show(results, targets)
    finish("migration", targets, results, ("torch", "aiohttp"), save=not options.quick)


if __name__ == "__main__":
    main()
