"""Time to first token and time per output token: gateway and split pools, one pod, the engine.

    .venv/bin/python -m benchmarks.first_token [--quick]

SmolLM2-135M in bfloat16 on the local cluster, closed loop at 1, 4 and 8 streams, random prompts
(no prefix-cache hits), greedy. Three systems take turns, pass by pass, on the same machine:

- split: client -> gateway -> 1 prefill and 2 decode pods;
- both: client -> gateway -> one pod that does both;
- engine: the same engine in this process, no HTTP: what the machine can do.

Then the handoff alone: a prompt that the prefill pod has in its prefix cache and the decode pod
has not, so that nothing is computed while its KV moves; beside the machine's loopback TCP.
A baseline: its targets have no bounds yet.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import aiohttp
import msgspec
import numpy as np
import openai
from rich.console import Console
from rich.table import Table
from tandem_runtime import contract
from tandem_runtime.config import EngineConfig
from tandem_runtime.engine.build import build_engine
from tandem_runtime.engine.engine import Engine
from tandem_runtime.engine.sequence import Request
from tandem_runtime.protocol import (
    GenerateEvent,
    GenerateRequest,
    Handoff,
    PrefillTarget,
    Sampling,
)

from benchmarks.fleet import MODEL_URI, BenchFleet, cluster, note, serve
from benchmarks.report import Target, finish

DTYPE: Final = "bfloat16"
PROMPT_TOKENS: Final = 256
OUTPUT_TOKENS: Final = 32
STREAMS: Final = (1, 4, 8)
WORDS: Final = range(1000, 40_000)
LOOPBACK_BYTES: Final = 1 << 28


@dataclass(frozen=True)
class Timing:
    """One request."""

    ttft_s: float
    tpot_s: float


@dataclass
class Series:
    """All timings of one system at one number of streams."""

    passes: list[list[Timing]] = field(default_factory=list)

    def percentile_ms(self, what: str, percent: float) -> float:
        """The median over passes of each pass's percentile, in milliseconds."""
        return 1e3 * median(
            float(np.percentile([getattr(t, what) for t in timings], percent))
            for timings in self.passes
        )


def random_prompt(chance: random.Random, tokens: int = PROMPT_TOKENS) -> list[int]:
    return [chance.choice(WORDS) for _ in range(tokens)]


# -- the three systems ------------------------------------------------------------------------


async def ask(client: openai.AsyncOpenAI, model: str, prompt: list[int]) -> Timing:
    """One streamed completion, timed where the user is."""
    begun_s = time.perf_counter()
    times_s: list[float] = []
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, stream=True
    )
    async for chunk in stream:
        if any(choice.text for choice in chunk.choices):
            times_s.append(time.perf_counter())
    first_s, last_s = times_s[0], times_s[-1]
    return Timing(first_s - begun_s, (last_s - first_s) / (OUTPUT_TOKENS - 1))


async def through_gateway(
    fleet: BenchFleet, streams: int, requests: int, seed: int
) -> list[Timing]:
    """Closed loop of `streams` clients."""
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="unused", timeout=300)
    chance = random.Random(seed)
    waiting = [random_prompt(chance) for _ in range(requests)]

    async def one_client() -> list[Timing]:
        found = []
        while waiting:
            found.append(await ask(client, fleet.model, waiting.pop()))
        return found

    found = await asyncio.gather(*(one_client() for _ in range(streams)))
    await client.close()
    return [timing for timings in found for timing in timings]


def engine_alone(engine: Engine, streams: int, requests: int, seed: int) -> list[Timing]:
    """The same closed loop without any network."""
    chance = random.Random(seed)
    waiting = [random_prompt(chance) for _ in range(requests)]
    begun_s: dict[str, float] = {}
    first_s: dict[str, float] = {}
    timings = []
    sampling = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0)

    def admit() -> None:
        if waiting:
            name = f"{seed}-{len(waiting)}"
            begun_s[name] = time.perf_counter()
            engine.add(Request(name, waiting.pop(), sampling))

    for _ in range(streams):
        admit()
    while engine.has_work:
        output = engine.step()
        now_s = time.perf_counter()
        for stream in output.streams:
            if stream.token is None:
                continue
            first_s.setdefault(stream.request_id, now_s)
            if stream.finish_reason is not None:
                began, first = begun_s[stream.request_id], first_s[stream.request_id]
                timings.append(Timing(first - began, (now_s - first) / (OUTPUT_TOKENS - 1)))
                admit()
    return timings


# -- the handoff ------------------------------------------------------------------------------


async def handoff_rates(fleet: BenchFleet, tokens: int, times: int) -> list[dict[str, float]]:
    """KV of a prompt that the prefill pod has cached and the decode pod has not."""
    (prefill,) = fleet.pods(contract.Role.PREFILL)
    decodes = fleet.pods(contract.Role.DECODE)
    target = PrefillTarget(*prefill, contract.HANDOFF_PORT)
    headers = {"authorization": f"Bearer {fleet.pod_token()}"}
    chance = random.Random(99)
    found = []
    async with aiohttp.ClientSession(headers=headers) as session:
        for number in range(times):
            prompt = random_prompt(chance, tokens)
            for name, address in decodes:
                request = GenerateRequest(
                    stream_id=f"handoff-{number}-{name}",
                    epoch=0,
                    prompt_ids=prompt,
                    sampling=Sampling(max_tokens=2, temperature=0.0),
                    prefill=target,
                )
                url = f"http://{address}:{contract.HTTP_PORT}{contract.PATH_GENERATE}"
                moved, took_s = await _handoff(session, url, request)
                # The first of the two pods warmed the prefill pod's cache.
                if name != decodes[0][0]:
                    found.append({"bytes": moved, "s": took_s, "mb_per_s": moved / took_s / 1e6})
    return found


async def _handoff(
    session: aiohttp.ClientSession, url: str, request: GenerateRequest
) -> tuple[int, float]:
    """Bytes and seconds of the handoff of one stream."""
    found: Handoff | None = None
    async with session.post(url, data=msgspec.json.encode(request)) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            event = msgspec.json.decode(line, type=GenerateEvent)
            if event.error is not None:
                raise RuntimeError(event.error)
            found = event.handoff or found
    if found is None:
        raise RuntimeError(f"{url} computed the prompt itself; the prefill pod's log may say why")
    return found.bytes, found.duration_s


def loopback_mb_per_s() -> float:
    """What one TCP connection on this machine moves, from one thread to another."""
    chunk = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def send() -> None:
            with socket.create_connection(listener.getsockname()) as out:
                for _ in range(LOOPBACK_BYTES // len(chunk)):
                    out.sendall(chunk)

        sender = threading.Thread(target=send)
        sender.start()
        into = bytearray(1 << 20)
        with listener.accept()[0] as connection:
            begun_s, left = time.perf_counter(), LOOPBACK_BYTES
            while left:
                left -= connection.recv_into(into)
            took_s = time.perf_counter() - begun_s
        sender.join()
    return LOOPBACK_BYTES / took_s / 1e6


# -- the run ----------------------------------------------------------------------------------


def measure(split: BenchFleet, both: BenchFleet, passes: int) -> dict[str, dict[int, Series]]:
    """All systems at all numbers of streams, taking turns; one pass more to warm up."""
    engine = build_engine(EngineConfig(MODEL_URI, dtype=DTYPE))
    systems: dict[str, Callable[[int, int, int], Awaitable[list[Timing]]]] = {
        "split": lambda streams, requests, seed: through_gateway(split, streams, requests, seed),
        "both": lambda streams, requests, seed: through_gateway(both, streams, requests, seed),
        "engine": lambda streams, requests, seed: asyncio.to_thread(
            engine_alone, engine, streams, requests, seed
        ),
    }
    series = {name: {streams: Series() for streams in STREAMS} for name in systems}
    for number in range(passes + 1):
        for streams in STREAMS:
            for place, (name, run) in enumerate(systems.items()):
                requests = streams * (1 if number == 0 else 3) + 1
                seed = 1000 * number + 10 * streams + place
                timings = asyncio.run(_timed(run, streams, requests, seed))
                if number > 0:
                    series[name][streams].passes.append(timings)
        note(f"pass {number} of {passes} is done")
    return series


async def _timed(
    run: Callable[[int, int, int], Awaitable[list[Timing]]], streams: int, requests: int, seed: int
) -> list[Timing]:
    return await run(streams, requests, seed)


def show(series: dict[str, dict[int, Series]]) -> None:
    """The table for people."""
    table = Table(title=f"{PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens, {DTYPE}, ms")
    for heading in ("streams", "system", "TTFT p50", "p95", "TPOT p50", "p95"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for streams in STREAMS:
        for name, of_streams in series.items():
            one = of_streams[streams]
            cells = (
                one.percentile_ms(what, percent)
                for what in ("ttft_s", "tpot_s")
                for percent in (50, 95)
            )
            table.add_row(str(streams), name, *(f"{cell:.1f}" for cell in cells))
        table.add_section()
    Console().print(table)


def targets_of(
    series: dict[str, dict[int, Series]], handoff: list[dict[str, float]], limit: float
) -> list[Target]:
    """Ratios to the engine alone, and the handoff's rate."""
    found = []
    for streams in STREAMS:
        for what in ("ttft_s", "tpot_s"):
            floor = series["engine"][streams].percentile_ms(what, 50)
            for system in ("split", "both"):
                ratio = series[system][streams].percentile_ms(what, 50) / floor
                name = f"{what.removesuffix('_s')} p50 {system}/engine, {streams} streams"
                found.append(Target(name, round(ratio, 3), None))
    rate = median(one["mb_per_s"] for one in handoff)
    found.append(Target("handoff, MB/s", round(rate, 1), None, "at least"))
    found.append(Target("handoff / loopback TCP", round(rate / limit, 4), None, "at least"))
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one pass, and no result file")
    options = parser.parse_args()
    passes = 1 if options.quick else 3
    with cluster() as running:
        split = serve(running, "split", prefill=1, decode=2, dtype=DTYPE)
        both = serve(running, "both", prefill=None, decode=1, dtype=DTYPE)
        series = measure(split, both, passes)
        handoff = asyncio.run(handoff_rates(split, 2048, 3 * passes))
    limit = loopback_mb_per_s()
    show(series)
    took = median(one["s"] for one in handoff)
    moved, rate = handoff[0]["bytes"], median(one["mb_per_s"] for one in handoff)
    print(
        f"handoff of 2048 tokens: {moved / 1e6:.1f} MB in {took * 1e3:.0f} ms, {rate:.0f} MB/s; "
        f"loopback TCP: {limit:.0f} MB/s"
    )
    results: dict[str, Any] = {
        "percentiles_ms": {
            name: {
                str(streams): {
                    f"{what}_p{percent}": round(one.percentile_ms(f"{what}_s", percent), 2)
                    for what in ("ttft", "tpot")
                    for percent in (50, 95)
                }
                for streams, one in of_streams.items()
            }
            for name, of_streams in series.items()
        },
        "handoff": handoff,
        "loopback_mb_per_s": round(limit, 1),
    }
    finish(
        "first_token",
        targets_of(series, handoff, limit),
        results,
        ("torch", "uvicorn", "aiohttp"),
        save=not options.quick,
    )


if __name__ == "__main__":
    main()
