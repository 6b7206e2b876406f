"""Events on the users' objects, through events.k8s.io/v1, each said once.

A repetition within `WINDOW_S` is not written: plans are level-triggered and would say the same
thing on every pass. Later repetitions raise the series' count of the same Event.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from tandem_operator.kube.client import ApiError, Body, Kube
from tandem_operator.names import MANAGER
from tandem_operator.plan.actions import Notify
from tandem_operator.resources import EVENTS, Ref

log = logging.getLogger(__name__)

WINDOW_S = 600.0
REMEMBERED = 4096
CLUSTER_EVENTS = "default"
"""Where Events about what is in no namespace are kept."""
NOTE_BYTES = 1024
"""The API's limit."""


@dataclass
class _Series:
    ref: Ref
    count: int
    last_s: float


class EventRecorder:
    """Publishes Notify actions."""

    def __init__(self, kube: Kube, instance: str, now_s: Callable[[], float]) -> None:
        self._kube = kube
        self._instance = instance
        self._now_s = now_s
        self._told: OrderedDict[str, _Series] = OrderedDict()

    async def record(self, event: Notify) -> None:
        """Publish, or drop a repetition. Never raises: an Event is not worth a failed reconcile."""
        now_s, key = self._now_s(), _key(event)
        series = self._told.get(key)
        if series and 0.0 <= now_s - series.last_s < WINDOW_S:
            return
        try:
            if series is None:
                series = _Series(await self._create(event, key, now_s), 1, now_s)
            else:
                series = await self._repeat(series, event, key, now_s)
        except (ApiError, OSError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.namespace_terminating:
                return
            log.warning("event %s on %s lost: %s", event.reason, event.regarding.name, error)
            return
        self._told[key] = series
        self._told.move_to_end(key)
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)

    async def _create(self, event: Notify, key: str, now_s: float) -> Ref:
        regarding = event.regarding
        namespace = regarding.namespace or CLUSTER_EVENTS
        suffix = hashlib.blake2b(f"{key}{now_s}".encode(), digest_size=8).hexdigest()
        name = f"{regarding.name}.{suffix}"
        manifest: Body = {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": _micro_time(now_s),
            "type": event.type,
            "reason": event.reason,
            "action": event.reason,
            "note": _cut(event.note),
            "reportingController": f"tandem.dev/{MANAGER}",
            "reportingInstance": self._instance[:128],
            "regarding": {
                "apiVersion": regarding.resource.api_version,
                "kind": regarding.resource.kind,
                "name": regarding.name,
                "uid": regarding.uid,
                **({"namespace": regarding.namespace} if regarding.namespace else {}),
            },
        }
        await self._kube.create(manifest, manager=MANAGER)
        return Ref(EVENTS, namespace, name)

    async def _repeat(self, series: _Series, event: Notify, key: str, now_s: float) -> _Series:
        """Count it, or say it anew: the API server forgets Events after an hour."""
        count = series.count + 1
        change: Body = {"series": {"count": count, "lastObservedTime": _micro_time(now_s)}}
        try:
            await self._kube.patch(series.ref, change, manager=MANAGER)
        except ApiError as error:
            if error.status != 404:
                raise
            return _Series(await self._create(event, key, now_s), 1, now_s)
        return _Series(series.ref, count, now_s)


def _key(event: Notify) -> str:
    return f"{event.regarding.uid}/{event.type}/{event.reason}/{event.note}"


def _cut(note: str) -> str:
    return note.encode()[:NOTE_BYTES].decode(errors="ignore")


def _micro_time(now_s: float) -> str:
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
