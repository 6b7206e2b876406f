"""Clients that stream one answer after the other, and what each of them saw.

Those that come back go on with a stream whose connection broke, as
docs/how-to/resume-a-stream.md says; plain ones are `openai`'s, without retries.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import openai
from openai.types import Completion
from tandem_runtime import contract

from benchmarks.beside import Beside

PROMPT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 128
TIMEOUT_S: Final = 600.0
COME_BACK_S: Final = 25.0
"""So long a client tries to go on with its stream: less than pods keep it."""
WORDS: Final = range(1000, 40_000)
"""Ordinary words of SmolLM2's vocabulary: no special tokens."""

Token = tuple[str, float]
"""Its text and log probability: two runs are equal to the bit where these are."""


@dataclass
class Answer:
    """One request of one client, as far as it has come."""

    client: int
    """The number of who asks; a client always asks the same."""
    tokens: list[Token] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """When each chunk with tokens came."""
    finished: bool = False
    error: str = ""
    came_back: int = 0
    """Times that its client went on with it after its connection broke."""

    @property
    def longest_gap_s(self) -> float:
        """Between two chunks of tokens; 0 for fewer than two."""
        later = self.times_s[1:]
        return max((b - a for a, b in zip(self.times_s, later, strict=False)), default=0.0)

    def take(self, choice: Any) -> None:
        """One choice of one chunk."""
        self.finished = self.finished or choice.finish_reason is not None
        if choice.logprobs is not None and choice.logprobs.tokens:
            self.times_s.append(time.monotonic())
            said = choice.logprobs
            self.tokens += zip(said.tokens, said.token_logprobs, strict=True)


def prompt(client: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Token ids: a client always asks the same."""
    chance = random.Random(client)
    return [chance.choice(WORDS) for _ in range(tokens)]


async def fill(
    answer: Answer,
    api: openai.AsyncOpenAI,
    model: str,
    prompt_ids: Sequence[int],
    max_tokens: int,
    salt: str = "",
) -> None:
    """One streamed completion."""
    try:
        stream = await api.completions.create(
            model=model,
            prompt=list(prompt_ids),
            stream=True,
            extra_body=_asked(answer, max_tokens, salt),
        )
        async for chunk in stream:
            for choice in chunk.choices:
                answer.take(choice)
    # httpx's own errors come through where a connection breaks in mid-stream.
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.finished:
        answer.error = answer.error or "the stream ended without a finish reason"


async def fill_coming_back(answer: Answer, api: openai.AsyncOpenAI, model: str) -> None:
    """The same, by a client that goes on with its stream when the connection breaks."""
    url = str(api.base_url).rstrip("/")
    body = {"model": model, "prompt": prompt(answer.client), **_asked(answer, OUTPUT_TOKENS)}
    request = ("POST", f"{url}/completions")
    came = _Came()
    deadline_s = time.monotonic() + COME_BACK_S
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        while not answer.finished and time.monotonic() < deadline_s:
            answer.error = ""
            json_body = body if request[0] == "POST" else None
            headers = {"last-event-id": came.event_id}
            try:
                async with http.stream(*request, json=json_body, headers=headers) as reply:
                    if reply.status_code != 200:
                        answer.error = f"{reply.status_code}: {(await reply.aread())[:200]!r}"
                        if reply.status_code == 404:
                            break
                    else:
                        answer.came_back += request[0] == "GET"
                        request = ("GET", f"{url}/streams/{reply.headers[contract.HEADER_STREAM]}")
                        deadline_s = time.monotonic() + COME_BACK_S
                        await came.read(reply, answer)
            except httpx.TransportError as error:
                answer.error = f"{type(error).__name__}: {error}"
            if not answer.finished:
                await asyncio.sleep(0.2)
    if not answer.finished:
        answer.error = answer.error or "the stream ended without a finish reason"


@dataclass
class _Came:
    """How far a stream has come."""

    event_id: str = ""

    async def read(self, reply: httpx.Response, answer: Answer) -> None:
        event_id = self.event_id
        async for line in reply.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    answer.error = str(chunk["error"]["message"])
                    return
                for choice in Completion.construct(**chunk).choices:
                    answer.take(choice)
                self.event_id = event_id


def _asked(answer: Answer, max_tokens: int, salt: str = "") -> dict[str, Any]:
    """Even clients greedy, odd ones sampled with a seed of their own."""
    return {
        "max_tokens": max_tokens,
        "temperature": 0.8 * (answer.client % 2),
        "seed": answer.client,
        "logprobs": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_salt": salt or None,
    }


class Clients(Beside):
    """`with Clients(url, model, numbers) as clients:` asks until the block ends, in a thread.

    Closed loop: a client asks again once it has its answer, and at least once. No retries: what a
    client without any would see is counted, but for those that come back to streams that have
    begun. Leaving the block waits for the answers that run.
    """

    def __init__(
        self, url: str, model: str, numbers: Sequence[int], *, come_back: bool = False
    ) -> None:
        super().__init__(lambda: asyncio.run(self._run()))
        self._url, self._model = url, model
        self._come_back = come_back
        self._now = {number: Answer(number) for number in numbers}
        self.answers: list[Answer] = []
        """Those that have ended."""

    @property
    def streaming(self) -> bool:
        """Whether every client is in the middle of an answer, past its first tokens."""
        return all(8 <= len(one.tokens) < OUTPUT_TOKENS - 16 for one in self._now.values())

    async def _run(self) -> None:
        api = openai.AsyncOpenAI(
            base_url=f"{self._url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT_S
        )
        await asyncio.gather(*(self._client(api, number) for number in self._now))
        await api.close()

    async def _client(self, api: openai.AsyncOpenAI, number: int) -> None:
        while True:
            answer = self._now[number] = Answer(number)
            if self._come_back:
                await fill_coming_back(answer, api, self._model)
            else:
                await fill(answer, api, self._model, prompt(number), OUTPUT_TOKENS)
            self.answers.append(answer)
            if self.stop.is_set():
                return
            if answer.error:
                # As a client that is told to come back would, not in a tight loop.
                await asyncio.sleep(1.0)
