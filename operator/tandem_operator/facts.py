"""What the operator learned by asking and cannot read from objects: kept while the process lives.

Losing all of it costs a few repeated questions, never a wrong decision.
"""

from __future__ import annotations

from tandem_operator.api.fleet import Latency
from tandem_operator.keys import Key
from tandem_operator.plan.latency import Published, publish
from tandem_operator.plan.nodes.view import Straggler
from tandem_operator.plan.scaled import Scaled
from tandem_operator.plan.views import TemplateCheck

REFUSAL_LIFETIME_S = 240.0
"""After that a refused template is tried again: a quota or an admission policy may have changed."""


class Facts:
    """Answers by namespace and name."""

    def __init__(self) -> None:
        self._checks: dict[tuple[str, str], tuple[TemplateCheck, float]] = {}
        self._secrets: dict[str, float] = {}
        self._latencies: dict[tuple[str, str], Published] = {}
        self._refusals: dict[Key, str] = {}
        self.eviction_refusals: dict[str, str] = {}
        """Why the last eviction of a pod was refused, by uid."""
        self.xids: dict[str, dict[int, tuple[float, ...]]] = {}
        """When counts of NVIDIA's error codes rose lately, by node and code."""
        self.reports: dict[str, str] = {}
        """What pods say is wrong with their devices, by uid."""
        self.stragglers: tuple[Straggler, ...] = ()
        """Pods that are slower than their peers."""
        self.suspected: dict[str, int] = {}
        """By how many percent pods seem to be, by uid."""
        self._scaled: dict[tuple[str, str], dict[str, Scaled]] = {}

    def learn_check(self, namespace: str, key: str, check: TemplateCheck, now_s: float) -> None:
        """The API server's answer to a dry run."""
        self._checks[namespace, key] = (check, now_s)

    def checks(self, namespace: str, now_s: float) -> dict[str, TemplateCheck]:
        """Answers that still hold, by `check_key`."""
        self._checks = {
            key: (check, at_s)
            for key, (check, at_s) in self._checks.items()
            if 0.0 <= now_s - at_s < REFUSAL_LIFETIME_S  # Less: the clock was set back.
        }
        return {key: check for (ns, key), (check, _) in self._checks.items() if ns == namespace}

    def learn_refusal(self, key: Key, sentence: str | None) -> None:
        """Why the key's last plan could not make an object; None when nothing was refused."""
        self._refusals.pop(key, None)
        if sentence:
            self._refusals[key] = sentence

    def refusal(self, key: Key) -> str | None:
        """What `learn_refusal` was last told."""
        return self._refusals.get(key)

    @property
    def of_nodes(self) -> tuple[object, ...]:
        """What was learned of nodes, to see whether it changed."""
        return self.xids, self.reports, self.stragglers, self.suspected

    def learn_eviction(self, uid: str, refusal: str | None) -> None:
        """The API server's answer to an eviction; None: it was carried out."""
        self.eviction_refusals.pop(uid, None)
        if refusal:
            self.eviction_refusals[uid] = refusal

    def keep_refusals(self, pods: set[str]) -> None:
        """Forget refused evictions of pods that are gone."""
        kept = {uid: text for uid, text in self.eviction_refusals.items() if uid in pods}
        self.eviction_refusals = kept

    def learn_secret(self, namespace: str, now_s: float) -> None:
        """The namespace's handoff secret was created, or was there."""
        self._secrets[namespace] = now_s

    def secret_ensured_s(self, namespace: str) -> float | None:
        """When `learn_secret` was last called."""
        return self._secrets.get(namespace)

    def forget_namespace(self, namespace: str) -> None:
        """The namespace has no fleets any more: its gateway and secret go."""
        self._secrets.pop(namespace, None)

    def learn_latency(
        self, namespace: str, fleet: str, measured: Latency | None, now_s: float
    ) -> bool:
        """One round of measurements; whether the fleet's status has to change."""
        before = self._latencies.get((namespace, fleet), Published())
        after = publish(before, measured, now_s)
        self._latencies[namespace, fleet] = after
        return after.latency != before.latency

    def scaled(self, namespace: str, fleet: str) -> dict[str, Scaled]:
        """The last decisions for a fleet's autoscaled pools, by pool name."""
        return self._scaled.get((namespace, fleet), {})

    def learn_scaled(self, namespace: str, fleet: str, found: dict[str, Scaled]) -> bool:
        """New decisions; whether the fleet's plan has something to do about them."""
        before = self.scaled(namespace, fleet)
        self._scaled[namespace, fleet] = found
        return any(
            now.writes
            or (old := before.get(name)) is None
            or (now.published, now.trouble, now.shadow) != (old.published, old.trouble, old.shadow)
            for name, now in found.items()
        )

    def scaled_pools(self, namespace: str) -> list[str]:
        """Names of the namespace's autoscaled pools."""
        return [
            pool for (ns, _), found in self._scaled.items() if ns == namespace for pool in found
        ]

    def keep_scaled(self, namespace: str, fleets: set[str]) -> None:
        """Forget the decisions for fleets that are not autoscaled any more."""
        for key in [k for k in self._scaled if k[0] == namespace and k[1] not in fleets]:
            del self._scaled[key]

    def forget_fleet(self, namespace: str, fleet: str) -> None:
        """The fleet is gone; a later one of its name has not been measured yet."""
        self._latencies.pop((namespace, fleet), None)
        self._scaled.pop((namespace, fleet), None)

    def latency(self, namespace: str, fleet: str) -> Latency | None:
        """What the fleet's status should say."""
        return self._latencies.get((namespace, fleet), Published()).latency
