"""An API server in memory: enough of create, apply, patch, scale, delete and garbage collection for
tests of the operator. Its own correctness is checked against the real one in tests/control.

Pods do what the test says (`FakeKube.pods_*`); everything else is immediate.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from typing import Any

from tandem_operator.kube.client import ApiError
from tandem_operator.plan.times import to_text
from tandem_operator.resources import (
    FLEETS,
    MODELS,
    NODE_HEALTH_POLICIES,
    PODS,
    POOLS,
    Ref,
    Resource,
    ref_of,
    resource_of,
)

Body = dict[str, Any]
Paths = dict[str, Any]


class Clock:
    """Seconds since the epoch, moved by the test."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FakeKube:
    """Objects by kind, namespace and name. `writes` lists every write that changed something."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.objects: dict[tuple[Resource, str, str], Body] = {}
        self.writes: list[str] = []
        self._uids = itertools.count(1)
        self._versions = itertools.count(1)
        self._applied: dict[tuple[str, str], Body] = {}
        self.refuse: Mapping[str, ApiError] = {}
        """Errors for creates, by the beginning of the object's name."""
        self.evictions: dict[str, str] = {}
        """Why an eviction is refused, by pod name."""
        self.strangers: dict[str, int] = {}

    # -- Kube ------------------------------------------------------------------------------------

    async def get(self, target: Ref) -> Body | None:
        found = self.objects.get((target.resource, target.namespace, target.name))
        return copy.deepcopy(found)

    async def list(
        self, resource: Resource, namespace: str, selector: Mapping[str, str]
    ) -> list[Body]:
        return [
            copy.deepcopy(body)
            for (kind, ns, _), body in self.objects.items()
            if kind == resource
            and ns == namespace
            and selector.items() <= (body["metadata"].get("labels") or {}).items()
        ]

    async def create(self, manifest: Body, *, manager: str, dry_run: bool = False) -> Body:
        target = ref_of(manifest)
        for prefix, error in self.refuse.items():
            if target.name.startswith(prefix):
                raise error
        if await self.get(target):
            raise ApiError(409, "AlreadyExists", f"{target.name} already exists")
        if dry_run:
            return manifest
        return self._store(target, copy.deepcopy(manifest), f"create {target.name}")

    async def apply(self, manifest: Body, *, manager: str) -> Body:
        target = ref_of(manifest)
        live = await self.get(target) or {"metadata": {}}
        before = self._applied.get((f"{target.resource.kind}/{target.name}", manager), {})
        merged = _overlay(_without(live, before, manifest), manifest)
        self._applied[f"{target.resource.kind}/{target.name}", manager] = copy.deepcopy(manifest)
        return self._store(target, merged, f"apply {target.name}")

    async def apply_status(self, target: Ref, status: Mapping[str, Any], *, manager: str) -> Body:
        live = await self._expect(target)
        live["status"] = copy.deepcopy(dict(status))
        return self._store(target, live, f"status {target.name}", status=True)

    async def patch(self, target: Ref, change: Body, *, manager: str) -> Body:
        live = await self._expect(target)
        version = change["metadata"].get("resourceVersion") if "metadata" in change else None
        if version not in (None, live["metadata"].get("resourceVersion")):
            raise ApiError(409, "Conflict", "the object has been modified")
        return self._store(target, _merge_patch(live, change), f"patch {target.name}")

    async def scale(self, target: Ref, replicas: int, *, manager: str) -> None:
        live = await self._expect(target)
        live["spec"]["replicas"] = replicas
        self._store(target, live, f"scale {target.name}")

    async def delete(self, target: Ref, *, grace_s: int | None = None) -> None:
        live = await self._expect(target)
        if grace_s == 0:
            self.vanish(target)
        elif target.resource == PODS and "deletionTimestamp" not in live["metadata"]:
            live["metadata"]["deletionTimestamp"] = to_text(self.clock())
            self._store(target, live, f"delete {target.name}")
        elif target.resource != PODS:
            self.vanish(target)

    async def evict(self, target: Ref) -> None:
        await self._expect(target)
        if (sentence := self.evictions.get(target.name)) is not None:
            raise ApiError(429, "TooManyRequests", sentence)
        await self.delete(target)

    async def count_pods(self, node: str, ignoring: Mapping[str, str]) -> int:
        return self.strangers.get(node, 0)

    async def replace(self, manifest: Body) -> Body:
        raise NotImplementedError

    # -- the rest of the cluster -------------------------------------------------------------------

    def vanish(self, target: Ref) -> None:
        """The object is gone, and what it controlled is deleted in the background."""
        self.objects.pop((target.resource, target.namespace, target.name))
        self.writes.append(f"gone {target.name}")
        self.collect()

    def collect(self) -> None:
        """Garbage collection: whatever has owners of which none exists."""
        alive = {body["metadata"]["uid"] for body in self.objects.values()}
        for key, body in list(self.objects.items()):
            owners = {owner["uid"] for owner in body["metadata"].get("ownerReferences", ())}
            if not owners or owners & alive or key not in self.objects:
                continue
            if key[0] != PODS:
                self.vanish(ref_of(body))
            elif "deletionTimestamp" not in body["metadata"]:
                body["metadata"]["deletionTimestamp"] = to_text(self.clock())

    def pods(self, namespace: str) -> list[Body]:
        return [b for (kind, ns, _), b in self.objects.items() if (kind, ns) == (PODS, namespace)]

    def user_write(self, body: Body) -> None:
        """A user creates or replaces an object; the schema's defaults are the caller's."""
        self._store(ref_of(body), copy.deepcopy(body), f"user {body['metadata']['name']}")

    async def _expect(self, target: Ref) -> Body:
        live = await self.get(target)
        if live is None:
            raise ApiError(404, "NotFound", f"{target.name} not found")
        if target.uid and live["metadata"]["uid"] != target.uid:
            raise ApiError(409, "Conflict", f"the UID in the precondition ({target.uid}) is not")
        return live

    def _store(self, target: Ref, body: Body, what: str, *, status: bool = False) -> Body:
        key = (target.resource, target.namespace, target.name)
        live = self.objects.get(key)
        body = json.loads(json.dumps(body))
        meta = body.setdefault("metadata", {})
        if live is None:
            meta["uid"] = f"uid-{next(self._uids)}"
            meta["creationTimestamp"] = to_text(self.clock())
            meta["generation"] = 1
        else:
            for field in ("uid", "creationTimestamp", "generation", "resourceVersion"):
                meta[field] = live["metadata"][field]
            if body.get("spec") != live.get("spec"):
                meta["generation"] += 1
            if not status and target.resource in (FLEETS, MODELS, POOLS, NODE_HEALTH_POLICIES):
                body["status"] = live.get("status", {})
        if target.resource == POOLS:
            body["spec"].setdefault("replicas", 1)
        if live != body:
            self.writes.append(what)
            meta["resourceVersion"] = str(next(self._versions))
        resource = resource_of(body)
        assert resource == target.resource
        self.objects[key] = body
        return copy.deepcopy(body)


def _overlay(live: Any, manifest: Any) -> Any:
    if isinstance(live, dict) and isinstance(manifest, dict):
        return live | {k: _overlay(live.get(k), v) for k, v in manifest.items()}
    return copy.deepcopy(manifest)


def _without(live: Body, before: Body, now: Body) -> Body:
    """`live` without the fields that this manager applied before and does not any more."""
    kept = {}
    for key, value in live.items():
        if key in before and key not in now and not isinstance(value, dict):
            continue
        if isinstance(value, dict) and isinstance(before.get(key), dict):
            value = _without(value, before[key], now.get(key) or {})
            if not value and key not in now:
                continue
        kept[key] = value
    return kept


def _merge_patch(live: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    merged = dict(live) if isinstance(live, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge_patch(merged.get(key), value)
    return merged
