"""From a served name to a model: which fleet, which revision, its tokenizer.

Tokenizers come from the pods (`PATH_TOKENIZER`), once for each revision. A stream's token ids mean
the same on all revisions whose weights are the same, and only there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

from tandem_runtime.frontend.backend import ModelCard, ServedModel
from tandem_runtime.frontend.errors import ModelNotFound, Unavailable
from tandem_runtime.gateway.discovery import Discovery
from tandem_runtime.gateway.pod_client import PodClient, PodUnreachable
from tandem_runtime.gateway.pods import PodView
from tandem_runtime.gateway.route import fleet_of
from tandem_runtime.protocol import TokenizerBundle

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5
Key = tuple[str, str]
"""Fleet and revision."""


class Fleets:
    def __init__(self, discovery: Discovery, client: PodClient) -> None:
        self._discovery = discovery
        self._client = client
        self._bundles: dict[Key, TokenizerBundle] = {}
        self._fetching: dict[Key, asyncio.Task[TokenizerBundle]] = {}
        self._models: dict[tuple[str, str, str], ServedModel] = {}

    def cards(self) -> Sequence[ModelCard]:
        """All served names of the namespace."""
        pods = self._discovery.pods
        names = sorted({name for pod in pods for name in pod.served_names})
        return [self._card(name, pods) for name in names]

    async def resolve(self, name: str) -> ServedModel:
        """Raises `ModelNotFound`, or `Unavailable` with a sentence."""
        pods = self._discovery.pods
        fleet = fleet_of(pods, name)
        if fleet is None:
            if not self._discovery.synced:
                raise Unavailable("The gateway has not seen any pods yet.")
            raise ModelNotFound(name, [card.name for card in self.cards()])
        members = [pod for pod in pods if pod.fleet == fleet]
        bundle = await self._bundle(fleet, members)
        key = (name, fleet, bundle.digest)
        if key not in self._models:
            self._models[key] = ServedModel.of(self._card(name, pods), bundle)
        return self._models[key]

    def pods_of(self, model: ServedModel) -> list[PodView]:
        """The fleet's pods to which this model's token ids mean the same."""
        fleet, digest = model.card.fleet, model.tokenizer.bundle.digest
        same = {
            revision
            for (owner, revision), bundle in self._bundles.items()
            if owner == fleet and bundle.digest == digest
        }
        return [p for p in self._discovery.pods if p.fleet == fleet and p.revision in same]

    async def refresh(self) -> None:
        """Fetches the tokenizers of new revisions before a request needs them; forgets old ones."""
        pods = self._discovery.pods
        present = {(pod.fleet, pod.revision) for pod in pods}
        for key in list(self._bundles):
            if key not in present:
                del self._bundles[key]
        for fleet, revision in present:
            admitting = [p for p in pods if p.admits and (p.fleet, p.revision) == (fleet, revision)]
            if admitting and (fleet, revision) not in self._bundles:
                try:
                    await self._fetch((fleet, revision), admitting)
                except PodUnreachable as error:
                    log.warning("no tokenizer of fleet %s yet: %s", fleet, error)

    def _card(self, name: str, pods: Sequence[PodView]) -> ModelCard:
        fleet = fleet_of(pods, name) or ""
        created = min(pod.created_unix_s for pod in pods if pod.fleet == fleet)
        return ModelCard(name, fleet, int(created))

    async def _bundle(self, fleet: str, members: Sequence[PodView]) -> TokenizerBundle:
        """Of the revision with most pods that decode now; of equals, the newest."""
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
        if key not in self._bundles:
            try:
                await self._fetch(key, [pod for pod in admitting if pod.revision == revision])
            except PodUnreachable as error:
                raise Unavailable(f"Fleet '{fleet}' gave no tokenizer: {error}.") from None
        return self._bundles[key]

    async def _fetch(self, key: Key, pods: Sequence[PodView]) -> None:
        """Requests that come at the same time share one fetch. Raises `PodUnreachable`."""
        if key not in self._fetching:
            task = asyncio.get_running_loop().create_task(self._ask(pods))
            self._fetching[key] = task
            task.add_done_callback(lambda _: self._fetching.pop(key))
        self._bundles[key] = await asyncio.shield(self._fetching[key])

    async def _ask(self, pods: Sequence[PodView]) -> TokenizerBundle:
        failure = PodUnreachable("it has no pod to ask")
        for pod in pods:
            try:
                return await self._client.tokenizer(pod)
            except PodUnreachable as error:
                failure = error
        raise failure
