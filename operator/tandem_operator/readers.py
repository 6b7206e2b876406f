"""Where objects come from: the watch's caches, or the API itself.

Reads normally come from Kopf's indices, which lag behind the API by moments. What destroys is
planned again on live reads. Live reads also find *ghosts*: objects whose deletion the watch missed
(Kopf does not notice deletions during a re-list); they are left out from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError
from tandem_runtime.protocol import ContextState, PodState

from tandem_operator.kube.client import Kube
from tandem_operator.names import LABEL_MANAGED_BY, MANAGED_BY
from tandem_operator.resources import (
    BUDGETS,
    CACHED_CONTEXTS,
    DEPLOYMENTS,
    FLEETS,
    MODELS,
    NODE_HEALTH_POLICIES,
    NODES,
    PODS,
    POOLS,
    REVISIONS,
    ROLE_BINDINGS,
    SCALING_POLICIES,
    SERVICE_ACCOUNTS,
    SERVICES,
    Ref,
    Resource,
)

log = logging.getLogger(__name__)

Body = Mapping[str, Any]
Labels = Mapping[str, str]
T = TypeVar("T")
WATCHED = (
    MODELS,
    FLEETS,
    POOLS,
    SCALING_POLICIES,
    CACHED_CONTEXTS,
    PODS,
    REVISIONS,
    BUDGETS,
    DEPLOYMENTS,
    SERVICES,
    SERVICE_ACCOUNTS,
    ROLE_BINDINGS,
    NODE_HEALTH_POLICIES,
    NODES,
)
CLUSTER = ""
"""Where caches have what is in no namespace."""


def selector(resource: Resource) -> dict[str, str]:
    """What is watched and listed of a kind: all of ours, only what we made of Kubernetes' own."""
    everyones = resource in (
        MODELS,
        FLEETS,
        SCALING_POLICIES,
        NODE_HEALTH_POLICIES,
        CACHED_CONTEXTS,
        NODES,
    )
    return {} if everyones else {LABEL_MANAGED_BY: MANAGED_BY}


class Reader(Protocol):
    """A source of objects."""

    async def list(self, resource: Resource, namespace: str, labels: Labels) -> list[Body]:
        """Every object of a watched kind in a namespace that has the labels, in no order."""


class LiveSource(Reader, Protocol):
    """The API server itself."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Body | None:
        """One object, of any kind that may be read; None if there is none."""


class StateSource(Protocol):
    """Asks runtime pods about themselves."""

    async def state(self, host: str) -> PodState:
        """Raises OSError when the pod does not answer."""

    async def context(self, host: str, uid: str, name: str) -> ContextState | None:
        """What a gateway knows of a context; None: nothing. Raises OSError when it is silent."""


class Cache(Protocol):
    """The watch's view, by kind and namespace."""

    def objects(self, resource: Resource, namespace: str) -> list[Body]:
        """What the watch has seen and not seen deleted."""


class CachedReader:
    """Reads from the watch's caches, without the ghosts."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._ghosts: dict[tuple[Resource, str], set[str]] = {}

    async def list(self, resource: Resource, namespace: str, labels: Labels) -> list[Body]:
        ghosts = self._ghosts.get((resource, namespace), set())
        cached = _labelled(self._cache.objects(resource, namespace), labels)
        return [body for body in cached if body["metadata"]["uid"] not in ghosts]

    def uids(self, resource: Resource, namespace: str, labels: Labels) -> set[str]:
        """What the watch has, ghosts included."""
        cached = self._cache.objects(resource, namespace)
        return {body["metadata"]["uid"] for body in _labelled(cached, labels)}

    def bury(self, resource: Resource, namespace: str, missing: set[str], found: set[str]) -> None:
        """Leave out what a live read missed, until one finds it or the watch forgets it."""
        old = self._ghosts.pop((resource, namespace), set())
        ghosts = (old - found) & self.uids(resource, namespace, {}) | missing
        if ghosts:
            self._ghosts[resource, namespace] = ghosts


class LiveReader:
    """Reads from the API server, and tells the cached reader what is gone."""

    def __init__(self, kube: Kube, cached: CachedReader) -> None:
        self._kube = kube
        self._cached = cached

    async def list(self, resource: Resource, namespace: str, labels: Labels) -> list[Body]:
        # Asked before the read: what is made while it runs is no ghost.
        cached = self._cached.uids(resource, namespace, labels)
        wanted = {**selector(resource), **labels}
        bodies: list[Body] = list(await self._kube.list(resource, namespace, wanted))
        found = {body["metadata"]["uid"] for body in bodies}
        self._cached.bury(resource, namespace, cached - found, found)
        return bodies

    async def get(self, resource: Resource, namespace: str, name: str) -> Body | None:
        return await self._kube.get(Ref(resource, namespace, name))


def _labelled(bodies: Iterable[Body], labels: Labels) -> list[Body]:
    return [
        body for body in bodies if labels.items() <= (body["metadata"].get("labels") or {}).items()
    ]


def parsed(parse: Callable[[Body], T], bodies: Iterable[Body]) -> tuple[T, ...]:
    """Every object that this operator understands, by name; one that it does not must not stop the
    rest. The order of a cache is no order: sentences that list objects would change with it."""
    views = []
    for body in sorted(bodies, key=lambda b: str(b["metadata"]["name"])):
        try:
            views.append(parse(body))
        except ValidationError as error:
            meta = body["metadata"]
            name = f"{meta.get('namespace')}/{meta['name']}"
            log.error("%s %s is not understood: %s", body.get("kind"), name, error)
    return tuple(views)
