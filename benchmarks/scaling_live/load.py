"""An open load: requests arrive by chance at a rate that changes, whether or not they are answered.

Every prompt is another one, so that no prefix cache helps.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import httpx

from benchmarks.beside import Beside

PROMPT_TOKENS: Final = 1500
"""Of the tiny model, whose tokens are bytes."""
OUTPUT_TOKENS: Final = 90
TIMEOUT_S: Final = 600.0
LOOK_S: Final = 0.5
"""How soon a change of the rate is noticed."""


@dataclass(frozen=True)
class Answer:
    """One request; times on the monotonic clock, in seconds."""

    arrived_s: float
    ttft_s: float
    tpot_s: float
    error: str = ""

    def within(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether both targets were kept."""
        return not self.error and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


class OpenLoad(Beside):
    """`with OpenLoad(url, model) as load:` sends `load.per_s` requests a second, by chance."""

    def __init__(self, url: str, model: str, seed: int = 0) -> None:
        super().__init__(lambda: asyncio.run(self._run()))
        self._url, self._model = url, model
        self._chance = random.Random(seed)
        self.per_s = 0.0
        self.answers: list[Answer] = []

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as http,
            asyncio.TaskGroup() as group,
        ):
            while not self.stop.is_set():
                if await self._next():
                    group.create_task(self._keep(http))

    async def _next(self) -> bool:
        """Waits for the next arrival, or until it is time to look at the rate again."""
        rate = self.per_s
        pause_s = self._chance.expovariate(rate) if rate > 0.0 else LOOK_S
        until_s = time.monotonic() + pause_s
        while (left_s := until_s - time.monotonic()) > 0.0:
            await asyncio.sleep(min(left_s, LOOK_S))
            if self.per_s != rate or self.stop.is_set():
                return False  # An exponential pause has no memory: it may begin anew.
        return rate > 0.0

    async def _keep(self, http: httpx.AsyncClient) -> None:
        self.answers.append(await self.ask(http))

    async def ask(self, http: httpx.AsyncClient) -> Answer:
        """One more request of the load, whenever it is wanted."""
        text = random_prompt(self._chance, PROMPT_TOKENS)
        return await stream(http, self._url, self._model, text, OUTPUT_TOKENS)


def random_prompt(chance: random.Random, tokens: int) -> str:
    """A token of the tiny model is a byte."""
    return "".join(chance.choices("abcdefgh ", k=tokens))


async def stream(
    http: httpx.AsyncClient, url: str, model: str, prompt: str, output_tokens: int
) -> Answer:
    """One streamed answer, however it ends."""
    arrived_s, times_s, whole = time.monotonic(), [], False
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times_s.append(time.monotonic())
                whole = whole or line == "data: [DONE]"
    except httpx.HTTPError as error:
        return Answer(arrived_s, 0.0, 0.0, f"{type(error).__name__}: {error}"[:200])
    if not whole or not times_s:
        return Answer(arrived_s, 0.0, 0.0, "the answer was cut short")
    tpot_s = (times_s[-1] - times_s[0]) / max(1, output_tokens - 1)
    return Answer(arrived_s, times_s[0] - arrived_s, tpot_s)


def share_within(answers: Sequence[Answer], ttft_s: float, tpot_s: float) -> float:
    """Of the answers, those that kept both targets; 1.0 of none."""
    return sum(a.within(ttft_s, tpot_s) for a in answers) / len(answers) if answers else 1.0


def recovered_after_s(
    answers: Sequence[Answer],
    begun_s: float,
    until_s: float,
    *,
    ttft_s: float,
    tpot_s: float,
    share: float,
    bucket_s: float,
) -> float:
    """From `begun_s` until the targets are kept for good: the end of the last bucket of arrivals of
    which fewer than `share` kept both; 0.0 if there is none."""
    last_s, at_s = begun_s, begun_s
    while at_s < until_s:
        here = [a for a in answers if at_s <= a.arrived_s < min(at_s + bucket_s, until_s)]
        at_s = min(at_s + bucket_s, until_s)
        if share_within(here, ttft_s, tpot_s) < share:
            last_s = at_s
    return last_s - begun_s
