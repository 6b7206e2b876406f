"""From a served name to a model: which fleet, which revision, its tokenizer and its limits.

Tokenizers come from the pods (`PATH_TOKENIZER`), once for each revision, and are kept as long as
the revision has pods. A stream's token ids mean the same on all revisions whose weights are the
same, and only there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from tandem_runtime.frontend.backend import ModelCard, ServedModel
from tandem_runtime.frontend.errors import ModelNotFound, Unavailable
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.health import PodHealth
from tandem_runtime.gateway.loops import repeat
from tandem_runtime.gateway.names import ServedNames
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.waking import Waking

log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 5
PERIOD_S: Final = 2.0
Key = tuple[str, str]
"""Fleet and revision."""


class Fleets:
    def __init__(
        self,
        discovery: Discovery,
        client: PodClient,
        health: PodHealth,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._discovery = discovery
        self._client = client
        self._health = health
        self._clock = clock
        self.waking = Waking(clock)
        self._names = ServedNames()
        self._models: dict[Key, ServedModel] = {}
        """Under no name yet, with the limits of the pod that gave the tokenizer."""
        self._fetching: dict[Key, asyncio.Task[ServedModel]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        await repeat("fetching tokenizers", self.refresh, PERIOD_S)

    def cards(self) -> Sequence[ModelCard]:
        """All served names of the namespace."""
        return list(self._cards().values())

    async def resolve(self, name: str) -> ServedModel:
        """Raises `ModelNotFound`, or `Unavailable` with a sentence."""
        cards = self._cards()
        if name not in cards:
            if not self._discovery.synced:
                raise Unavailable("The gateway has not seen any pods yet.")
            raise ModelNotFound(name, list(cards))
        card = cards[name]
        model = await self.waking.hold(card.fleet, lambda: self._model(card.fleet))
        return replace(model, card=card, context_tokens=self._context_tokens(model))

    async def model_of(self, pod: PodView) -> ServedModel:
        """That of the pod's revision, under no name. Raises `PodUnreachable`."""
        key = (pod.fleet, pod.revision)
        if key in self._models:
            return self._models[key]
        return await asyncio.shield(self._fetch(key, [pod]))

    def pods_of(self, model: ServedModel) -> list[PodView]:
        """The fleet's pods to which this model's token ids mean the same."""
        fleet, digest = model.card.fleet, model.tokenizer.bundle.digest
        same = {
            revision
            for (owner, revision), known in self._models.items()
            if owner == fleet and known.tokenizer.bundle.digest == digest
        }
        return [p for p in self._discovery.pods if p.fleet == fleet and p.revision in same]

    async def refresh(self) -> None:
        """Begins to fetch the tokenizers of new revisions, before a request needs them."""
        pods = self._discovery.pods
        self._cards()
        present = {(pod.fleet, pod.revision) for pod in pods}
        for gone in self._models.keys() - present:
            del self._models[gone]
        for key in present - self._models.keys():
            if admitting := [p for p in pods if p.admits and (p.fleet, p.revision) == key]:
                self._fetch(key, admitting)

    def _cards(self) -> dict[str, ModelCard]:
        # A name that pods have is theirs, whoever sleeps under it.
        return self.waking.cards() | self._names.cards(self._discovery.pods, self._clock())

    def _context_tokens(self, model: ServedModel) -> int:
        """What any pod that may get a stream can hold: they need not have equal memory."""
        limits = (self._health.context_tokens(p.uid) for p in self.pods_of(model) if p.admits)
        return min((limit for limit in limits if limit), default=model.context_tokens)

    async def _model(self, fleet: str) -> ServedModel:
        """Of the revision with most pods that decode now; of equals, the newest."""
        members = [pod for pod in self._discovery.pods if pod.fleet == fleet]
        admitting = [pod for pod in members if pod.admits]
        decoding = Counter(pod.revision for pod in admitting if pod.decodes)
        if not decoding:
            counts = f"{len(members)} pods exist, {sum(pod.ready for pod in members)} are ready"
            raise Unavailable(
                f"No pod of fleet '{fleet}' can serve now: {counts}. Try again shortly.",
                retry_after_s=RETRY_AFTER_S,
            )
        newest = {r: max(p.created_unix_s for p in admitting if p.revision == r) for r in decoding}
        revision = max(decoding, key=lambda r: (decoding[r], newest[r]))
        key = (fleet, revision)
        if key in self._models:
            return self._models[key]
        fetch = self._fetch(key, [pod for pod in admitting if pod.revision == revision])
        try:
            return await asyncio.shield(fetch)
        except PodUnreachable as error:
            raise Unavailable(f"Fleet '{fleet}' gave no tokenizer: {error}.") from None

    def _fetch(self, key: Key, pods: Sequence[PodView]) -> asyncio.Task[ServedModel]:
        """All who need a tokenizer share one fetch; it raises `PodUnreachable`."""

        def fetched(task: asyncio.Task[ServedModel]) -> None:
            del self._fetching[key]
            if task.cancelled():
                return
            if failure := task.exception():
                log.warning("no tokenizer of fleet %s yet: %s", key[0], failure)
            else:
                self._models[key] = task.result()

        if key not in self._fetching:
            task = asyncio.create_task(self._ask(pods))
            task.add_done_callback(fetched)
            self._fetching[key] = task
        return self._fetching[key]

    async def _ask(self, pods: Sequence[PodView]) -> ServedModel:
        failure = PodUnreachable("it has no pod to ask")
        for pod in pods:
            try:
                bundle = await self._client.tokenizer(pod)
                # Reading a large vocabulary takes a second.
                unnamed = ModelCard("", pod.fleet, 0)
                return await asyncio.to_thread(ServedModel.of, unnamed, bundle)
            except PodUnreachable as error:
                failure = error
            except Exception as error:  # `tokenizers` raises nothing more precise
                failure = PodUnreachable(f"the tokenizer of pod {pod.name} is broken: {error}")
        raise failure
