"""One attempt of a stream at a pair of pods: its events, and its share of their load."""

from __future__ import annotations

import asyncio

from tandem_runtime.gateway.load import Loads
from tandem_runtime.gateway.pod_client import PodClient
from tandem_runtime.gateway.route import Pair
from tandem_runtime.protocol import GenerateEvent, GenerateRequest

_OUTPUT_TOKENS = 128
"""What a stream is taken to generate, for the load."""


class Attempt:
    """Begins when its first event is awaited; to be closed in any case."""

    def __init__(self, client: PodClient, loads: Loads, pair: Pair, ask: GenerateRequest) -> None:
        self.pair = pair
        self.ask = ask
        self._loads = loads
        self._events = client.generate(pair.decode, ask)
        self._pending: asyncio.Task[GenerateEvent] | None = None
        prompt_tokens = len(ask.prompt_ids)
        self._shares = {pair.decode.uid: prompt_tokens + _OUTPUT_TOKENS}
        if pair.prefill is not None:
            self._shares[pair.prefill.uid] = prompt_tokens
        for uid, tokens in self._shares.items():
            loads.begin(uid, tokens)

    def ahead(self) -> asyncio.Task[GenerateEvent]:
        """The next event, awaited beside something else; `next` then gives it."""
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._next())
        return self._pending

    async def next(self) -> GenerateEvent:
        """Raises `PodUnreachable`."""
        if self._pending is None:
            return await self._next()
        try:
            return await self._pending
        finally:
            self._pending = None

    async def _next(self) -> GenerateEvent:
        return await anext(self._events)

    def prefilled(self) -> None:
        """The prefill pod has done its part."""
        prefill = self.pair.prefill
        if prefill is not None and prefill.uid in self._shares:
            self._loads.end(prefill.uid, self._shares.pop(prefill.uid))

    async def close(self) -> None:
        """Cancels the attempt, unless it has ended."""
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.gather(self._pending, return_exceptions=True)
            self._pending = None
        await self._events.aclose()
        for uid, tokens in self._shares.items():
            self._loads.end(uid, tokens)
        self._shares.clear()
