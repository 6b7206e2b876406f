"""The front end's backend in the gateway: streams over pairs of pods, moved when pods fail.

A stream is a sequence of attempts. Each goes to one pair; when it fails, the next one carries what
was generated so far, so the client sees a pause, never a lost or a repeated token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Final

from tandem_runtime.contract import KV_PAGE_TOKENS
from tandem_runtime.frontend.backend import ModelCard, Route, ServedModel
from tandem_runtime.frontend.errors import (
    ApiError,
    BadRequest,
    Internal,
    Poisonous,
    Superseded,
    Unavailable,
)
from tandem_runtime.gateway.affinity import PrefixMemory
from tandem_runtime.gateway.attempt import Attempt
from tandem_runtime.gateway.contexts import GatewayContexts
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.fleets import RETRY_AFTER_S, Fleets
from tandem_runtime.gateway.hashing import LONG_TOKENS, PromptHasher
from tandem_runtime.gateway.health import PodHealth
from tandem_runtime.gateway.journal import REFUSED, RESUMES, Journal
from tandem_runtime.gateway.load import Loads
from tandem_runtime.gateway.metrics import GatewayMetrics
from tandem_runtime.gateway.moves import Moves
from tandem_runtime.gateway.pages import PagesHeld
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.prompt_keys import PromptKeys
from tandem_runtime.gateway.relay import Relay
from tandem_runtime.gateway.route import Demand, NoRoute, Pair, choose, most_held
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, HeldStream, PrefillTarget

log = logging.getLogger(__name__)

RESUME_S: Final = 60.0
"""How long a stream that has begun waits for pods that can continue it, all in all."""
_WAIT_S: Final = 0.2
SUPERSEDED: Final = "superseded"


class GatewayBackend:
    def __init__(
        self,
        discovery: Discovery,
        fleets: Fleets,
        client: PodClient,
        health: PodHealth,
        loads: Loads,
        metrics: GatewayMetrics,
        handoff_secret: bytes,
        contexts: GatewayContexts,
        pages: PagesHeld,
        *,
        resume: bool = True,
    ) -> None:
        self.contexts = contexts
        self._discovery = discovery
        self._fleets = fleets
        self._client = client
        self._health = health
        self._loads = loads
        self._metrics = metrics
        self._hasher = PromptHasher(handoff_secret)
        self._resumes = RESUMES if resume else 1
        self._memory = PrefixMemory()
        self._pages = pages
        self.moves = Moves(discovery, client, health)
        self.streams = 0
        """Streams that run now."""
        self.leaving = False
        """Set by SIGTERM: requests are still served, new clients had better go elsewhere."""
        self.closed = False
        """Set once clients had time to notice: nothing new is admitted."""

    @property
    def ready(self) -> bool:
        return self._discovery.synced and not self.leaving

    def cards(self) -> Sequence[ModelCard]:
        return self._fleets.cards()

    async def resolve(self, name: str) -> ServedModel:
        return await self._fleets.resolve(name)

    async def generate(
        self, model: ServedModel, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        stream = self._stream(model, Journal(request, self._resumes), route)
        async with aclosing(stream) as events:
            async for event in events:
                yield event

    async def take_over(
        self, model: ServedModel, pod: PodView, held: HeldStream, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        """As `generate`, for a stream of another gateway: from its first token on."""
        journal = Journal.of(held, self._resumes)
        try:
            yield held.so_far
        except GeneratorExit:
            self._client.cancel(pod, held.request)  # a stop string, or the client left
            raise
        if journal.finished:
            return
        async with aclosing(self._stream(model, journal, route, Pair(pod, None))) as events:
            async for event in events:
                yield event

    async def _stream(
        self, model: ServedModel, journal: Journal, route: Route, first: Pair | None = None
    ) -> AsyncGenerator[GenerateEvent, None]:
        """`first`: where its first attempt goes, if that is not to be chosen."""
        if self.closed:
            raise Unavailable("This gateway is ending; ask again.")
        self.streams += 1
        try:
            keys = await self._hasher.keys(model.tokenizer.bundle, journal.request)
            while not journal.finished:
                pair, first = first or await self._pair(model, journal, keys), None
                route.attempts += 1
                route.decode_pod = pair.decode.name
                route.prefill_pod = "" if pair.prefill is None else pair.prefill.name
                async with aclosing(self._attempt(model, pair, journal, keys, route)) as events:
                    async for event in events:
                        yield event
        finally:
            self.streams -= 1

    async def _pair(self, model: ServedModel, journal: Journal, keys: PromptKeys) -> Pair:
        """Where the next attempt goes. Raises `ApiError` when the stream is to be given up."""
        if journal.crashes_pods or journal.exhausted:
            last = f"{journal.attempts} attempts failed, the last one because {journal.reason}."
            raise _given_up(journal, last)
        if journal.failures:
            await asyncio.sleep(journal.pause_s)
        while True:
            chosen = self._choose(model, journal, keys)
            if isinstance(chosen, Pair):
                return chosen
            if not journal.begun or journal.waited_s >= RESUME_S:
                fleet = model.card.fleet
                raise _given_up(
                    journal, f"No pod of fleet '{fleet}' can serve now: {chosen.reason}."
                )
            # Better one that failed before than none; the client is waiting in mid-sentence.
            journal.avoid.clear()
            await asyncio.sleep(_WAIT_S)
            journal.waited_s += _WAIT_S

    def _choose(self, model: ServedModel, journal: Journal, keys: PromptKeys) -> Pair | NoRoute:
        demand = self._demand(journal, keys, journal.avoid | self._health.unusable)
        pods, outstanding_tokens = self._fleets.pods_of(model), self._loads.outstanding_tokens()
        chosen = choose(pods, demand, outstanding_tokens)
        if isinstance(chosen, NoRoute):
            # Our suspicion may be wrong; the Kubernetes API's word is not doubted.
            chosen = choose(pods, replace(demand, avoid=journal.avoid), outstanding_tokens)
        return chosen

    def _demand(self, journal: Journal, keys: PromptKeys, avoid: Set[str]) -> Demand:
        request = journal.request
        guess = self._memory.held_tokens(keys)
        held_tokens = self._pages.correct(guess, keys, time.monotonic())
        if request.context:
            held_tokens |= self.contexts.held_tokens(request.context)
        return Demand(
            stream_id=request.stream_id,
            prompt_tokens=len(request.prompt_ids) + len(journal.output_ids),
            held_tokens=held_tokens,
            told_tokens={u: n * KV_PAGE_TOKENS for u, n in self._pages.told(keys).items()},
            peer_percent=self._pages.peer_percents(),
            avoid=avoid,
        )

    async def _attempt(
        self, model: ServedModel, pair: Pair, journal: Journal, keys: PromptKeys, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        """The events of one attempt, wherever it moves; ends without a finish when it failed."""
        decode, prefill = pair.decode, pair.prefill
        holder = self._holder(model, prefill or decode, keys)
        self._sent((prefill or decode).uid, keys)
        ask = journal.attempt(None if prefill is None else _target(prefill), holder)
        attempt = Attempt(self._client, self._loads, pair, ask)
        begin = partial(self._begin_move, model, journal, keys)
        relay = Relay(attempt, journal, self.moves, begin, self._metrics)
        try:
            while not journal.finished:
                event = await relay.next()
                pair = relay.current.pair
                route.decode_pod = pair.decode.name
                if event.error is not None:
                    self._fault(event, pair, journal)
                    return
                if journal.finished:
                    # Before the event goes out: after its finish nobody asks for more.
                    self._learn(model, journal, pair)
                yield event
        except PodUnreachable as error:
            self._failed(journal, relay.current.pair.decode.uid, str(error), "unreachable")
        finally:
            await relay.close()

    def _holder(self, model: ServedModel, pod: PodView, keys: PromptKeys) -> PrefillTarget | None:
        """Another pod that says it has more of the prompt than the one that computes it."""
        told = self._pages.told(keys)
        others = [
            other
            for other in self._fleets.pods_of(model)
            if other.revision == pod.revision and other.uid not in self._health.unusable
        ]
        best = most_held(others, told, self._loads.outstanding_tokens())
        if best is None or told[best.uid] <= told.get(pod.uid, 0):
            return None
        return PrefillTarget(best.name, best.ip, best.http_port)

    def _begin_move(
        self,
        model: ServedModel,
        journal: Journal,
        keys: PromptKeys,
        current: Attempt,
        tried: frozenset[str],
    ) -> Attempt | None:
        """Another pod of the revision is to take the stream over; None while there is none."""
        source = current.pair.decode
        pods = [
            pod
            for pod in self._fleets.pods_of(model)
            if pod.decodes and pod.revision == source.revision
        ]
        avoid = journal.avoid | self._health.unusable | tried | {source.uid}
        demand = self._demand(journal, keys, avoid)
        chosen = choose(pods, demand, self._loads.outstanding_tokens())
        if isinstance(chosen, NoRoute):
            return None
        return Attempt(self._client, self._loads, chosen, journal.takeover(_target(source)))

    def _fault(self, event: GenerateEvent, pair: Pair, journal: Journal) -> None:
        """An error event. Raises `ApiError` for one that no other pod would spare the client.

        What one pod refuses another may take: their memory differs, and so does what they hold.
        """
        reason = event.error or "it failed"
        if event.error_code == SUPERSEDED:
            raise Superseded(f"{reason[0].upper()}{reason[1:]}.")
        if not event.retryable and event.error_code != REFUSED:
            raise Internal(f"Pod {pair.decode.name} failed: {reason}.")
        culprit = pair.decode
        if pair.prefill is not None and event.failed_pod == pair.prefill.name:
            culprit = pair.prefill
        self._failed(journal, culprit.uid, reason, event.error_code or "unknown")

    def _failed(self, journal: Journal, uid: str, reason: str, code: str) -> None:
        journal.fail(uid, reason, code)
        self._metrics.attempt_failed(code, begun=journal.begun)
        log.warning("attempt %d of stream %s: %s", journal.epoch, journal.request.stream_id, reason)

    def _learn(self, model: ServedModel, journal: Journal, pair: Pair) -> None:
        """The decode pod holds the answer too: a conversation's next turn begins with it."""
        request = journal.request
        ids = [*request.prompt_ids, *journal.output_ids[:-1]]
        if len(ids) <= LONG_TOKENS:
            self._sent(pair.decode.uid, self._hasher.of(model.tokenizer.bundle, request, ids))

    def _sent(self, uid: str, keys: PromptKeys) -> None:
        """The pod has blocks with these keys, or will soon."""
        self._memory.learn(uid, keys)
        self._pages.expect(uid, keys, time.monotonic())


def _target(pod: PodView) -> PrefillTarget:
    return PrefillTarget(pod.name, pod.ip, pod.handoff_port)


def _given_up(journal: Journal, reason: str) -> ApiError:
    """`reason`: a sentence, where it is nothing about the request itself."""
    if journal.crashes_pods:
        return Poisonous(
            "This request is given up: two pods failed at the same point of it, after "
            f"{len(journal.output_ids)} tokens, the last one because {journal.reason}. Report it "
            "with the logs of the pods; asking again may fail more of them."
        )
    if journal.code == REFUSED:
        return BadRequest(f"{journal.reason[0].upper()}{journal.reason[1:]}".rstrip(".") + ".")
    return Unavailable(reason, retry_after_s=RETRY_AFTER_S)
