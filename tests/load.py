"""A steady load of completions on one fleet, from a thread of its own, and what became of it."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import openai
from tandem_runtime.contract import HEADER_TRACE

from benchmarks.beside import Beside

PROMPT_TOKENS = 64
OUTPUT_TOKENS = 16
REQUEST_TIMEOUT_S = 120.0
VOCABULARY = range(1000, 40_000)
"""Ordinary words of SmolLM2's vocabulary: no special tokens."""


@dataclass(frozen=True)
class Outcome:
    """One request: its answer's trace, or how it failed."""

    at_s: float
    """Since the load began."""
    duration_s: float
    tokens: int = 0
    trace: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        return self.trace.get("prefill_pod", ""), self.trace.get("decode_pod", "")


async def ask(
    client: openai.AsyncOpenAI, model: str, chance: random.Random, at_s: float
) -> Outcome:
    """One streamed completion of a random prompt, complete or failed."""
    begun_s = time.monotonic()
    prompt = [chance.choice(VOCABULARY) for _ in range(PROMPT_TOKENS)]
    tokens, finished, trace = 0, False, {}
    try:
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=OUTPUT_TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={HEADER_TRACE: "1"},
            # Random words may well be answered by the end of a text.
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            finished = finished or any(choice.finish_reason for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            trace = (chunk.model_extra or {}).get("tandem") or trace
    except openai.OpenAIError as error:
        return Outcome(at_s, time.monotonic() - begun_s, error=f"{type(error).__name__}: {error}")
    ended = None if finished else "the stream ended without a finish reason"
    return Outcome(at_s, time.monotonic() - begun_s, tokens, trace, ended)


async def capacity(url: str, model: str, *, streams: int = 4, duration_s: float = 8.0) -> float:
    """Requests a second that `streams` clients get through, one after the other."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    chance, end_s, done = random.Random(1), time.monotonic() + duration_s, 0

    async def one_client() -> None:
        nonlocal done
        while time.monotonic() < end_s:
            outcome = await ask(client, model, chance, 0.0)
            assert outcome.error is None, outcome.error
            done += 1

    begun_s = time.monotonic()
    await asyncio.gather(*(one_client() for _ in range(streams)))
    await client.close()
    return done / (time.monotonic() - begun_s)


class Load(Beside):
    """`with Load(url, model, rate) as load:` asks at a steady rate until the block ends.

    Open loop: a slow answer does not hold back the next request. No retries, so that whatever a
    user without a retrying client would see is counted.
    """

    def __init__(self, url: str, model: str, requests_per_s: float) -> None:
        super().__init__(lambda: asyncio.run(self._run()))
        self.url, self.model, self.requests_per_s = url, model, requests_per_s
        self.outcomes: list[Outcome] = []

    async def _run(self) -> None:
        client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=REQUEST_TIMEOUT_S
        )
        chance, begun_s, running = random.Random(0), time.monotonic(), set()
        number = 0
        while not self.stop.is_set():
            at_s = number / self.requests_per_s
            await asyncio.sleep(max(0.0, begun_s + at_s - time.monotonic()))
            running.add(asyncio.create_task(ask(client, self.model, chance, at_s)))
            number += 1
        self.outcomes = list(await asyncio.gather(*running))
        await client.close()

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is not None]
