"""A mixed load in a thread: clients that ask one thing after the other, and how fast it came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import httpx

from benchmarks.beside import Beside

LEAST_PROMPT_BYTES: Final = 64
PROMPT_SPREAD: Final = 24.0
"""The longest over the shortest prompt; their logarithms are spread evenly."""
LEAST_OUTPUT_TOKENS: Final = 16
MOST_OUTPUT_TOKENS: Final = 160
TIMEOUT_S: Final = 300.0


@dataclass(frozen=True)
class Answer:
    """One request that ended well; times on the monotonic clock."""

    begun_s: float
    ended_s: float
    tpot_s: float


class Clients(Beside):
    """`with Clients(url, model, n) as clients:` asks until the block ends.

    Lengths of prompts and answers are drawn anew each time, so that batches and contexts wander.
    """

    def __init__(self, url: str, model: str, clients: int, seed: int = 0) -> None:
        super().__init__(lambda: asyncio.run(self._run()))
        self._url, self._model, self._clients, self._seed = url, model, clients, seed
        self.answers: list[Answer] = []
        self.errors: list[str] = []

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self._clients)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        while not self.stop.is_set():
            size = round(LEAST_PROMPT_BYTES * PROMPT_SPREAD ** chance.random())
            tokens = chance.randint(LEAST_OUTPUT_TOKENS, MOST_OUTPUT_TOKENS)
            text = "".join(chance.choices("abcdefgh ", k=size))
            try:
                self.answers.append(await self._ask(http, text, tokens))
            except httpx.HTTPError as error:
                self.errors.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(1.0)

    async def _ask(self, http: httpx.AsyncClient, text: str, tokens: int) -> Answer:
        """Raises httpx.HTTPError, also where an answer is cut short."""
        body = {
            "model": self._model,
            "prompt": text,
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
        begun_s, first_s, whole = time.monotonic(), 0.0, False
        async with http.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first_s = first_s or time.monotonic()
                whole = whole or line == "data: [DONE]"
        ended_s = time.monotonic()
        if not whole:
            raise httpx.RemoteProtocolError("the answer was cut short")
        return Answer(begun_s, ended_s, (ended_s - first_s) / (tokens - 1))


def tpot_p99_ms(answers: Sequence[Answer], since_s: float, until_s: float) -> float | None:
    """Of answers that began and ended in between; None where there is none."""
    found = sorted(a.tpot_s for a in answers if a.begun_s >= since_s and a.ended_s <= until_s)
    return round(1000 * found[int(0.99 * len(found))], 1) if found else None
