"""Which fleet serves a name, also while the fleet has no pod. Pure; the caller has the clock.

Names are on pods alone. When a fleet's last pod is replaced there is a moment without any, and its
clients are to be told to come again, not that the model does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tandem_runtime.frontend.backend import ModelCard
from tandem_runtime.gateway.pods import PodView

MEMORY_S: Final = 300.0
"""How long the names of a fleet outlive its last pod; it bounds the memory, too."""


@dataclass(frozen=True)
class _Fleet:
    names: frozenset[str]
    created_unix_s: float
    """Of its oldest pod."""
    seen_s: float


class ServedNames:
    def __init__(self) -> None:
        self._fleets: dict[str, _Fleet] = {}

    def cards(self, pods: Sequence[PodView], now_s: float) -> dict[str, ModelCard]:
        """Each name that is served by these pods, or was by pods that are gone since shortly.

        Of several fleets that have a name, one with pods serves it: the one with the oldest.
        """
        self._see(pods, now_s)
        owners: dict[str, str] = {}
        for fleet, known in sorted(self._fleets.items(), key=lambda item: item[1].seen_s):
            owners.update(dict.fromkeys(known.names, fleet))
        for pod in sorted(pods, key=lambda pod: (pod.created_unix_s, pod.fleet), reverse=True):
            owners.update(dict.fromkeys(pod.served_names, pod.fleet))
        return {
            name: ModelCard(name, fleet, int(self._fleets[fleet].created_unix_s))
            for name, fleet in sorted(owners.items())
        }

    def _see(self, pods: Sequence[PodView], now_s: float) -> None:
        members: dict[str, list[PodView]] = {}
        for pod in pods:
            members.setdefault(pod.fleet, []).append(pod)
        for fleet, its_pods in members.items():
            names = frozenset(name for pod in its_pods for name in pod.served_names)
            self._fleets[fleet] = _Fleet(names, min(p.created_unix_s for p in its_pods), now_s)
        for fleet, known in list(self._fleets.items()):
            if now_s - known.seen_s > MEMORY_S:
                del self._fleets[fleet]
