"""Leader election by a coordination.k8s.io Lease: at most one operator acts.

The holder renews every few seconds and stops acting when it could not for a whole duration, by its
own monotonic clock; others take over once they have seen the same renewal unchanged for that long,
by theirs. Clocks of different machines are never compared.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tandem_operator.kube.client import ApiError, Kube
from tandem_operator.resources import LEASES, Ref

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Somebody else may act now: this process has to end."""


class LeaderLease:
    """One process's part in the election."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        duration_s: float,
        renew_s: float,
        monotonic_s: Callable[[], float],
        on_attempt: Callable[[bool], None] = lambda answered: None,
    ) -> None:
        """`on_attempt` is called after every attempt, with whether the API server answered."""
        self._kube = kube
        self._ref = Ref(LEASES, namespace, name)
        self._identity = identity
        self._duration_s = duration_s
        self._renew_s = renew_s
        self._monotonic_s = monotonic_s
        self._on_attempt = on_attempt
        self._seen: Any = None
        self._seen_s = 0.0
        self._valid_until_s = float("-inf")

    @property
    def held(self) -> bool:
        """Whether this process may act now. A fraction is kept for requests under way."""
        return self._monotonic_s() < self._valid_until_s

    async def acquire(self) -> None:
        """Wait until this process leads."""
        while not await self._attempt_in_time():  # noqa: ASYNC110 - the event is in the API server
            await asyncio.sleep(self._renew_s / 2)
        log.info("leading as %s", self._identity)

    async def keep(self) -> None:
        """Renew for ever. Raises LeaseLost."""
        while True:
            await asyncio.sleep(self._renew_s)
            renewed = await self._attempt_in_time()
            if not renewed and not self.held:
                raise LeaseLost(f"Lease {self._ref.name} could not be renewed in time")

    async def release(self) -> None:
        """Let a successor start at once; best effort."""
        self._valid_until_s = float("-inf")
        try:
            lease = await self._kube.get(self._ref)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._kube.replace(lease)
        except (ApiError, OSError, TimeoutError) as error:
            log.warning("lease not released: %s", error)

    async def _attempt_in_time(self) -> bool:
        """Give up on a request that hangs: it must not outlast the lease unnoticed."""
        try:
            return await asyncio.wait_for(self._attempt(), self._renew_s)
        except TimeoutError:
            log.warning("lease not renewed: no answer within %g s", self._renew_s)
            self._on_attempt(False)
            return False

    async def _attempt(self) -> bool:
        """Take or renew the lease once; False when somebody else holds it or the API is away."""
        started_s = self._monotonic_s()
        try:
            lease = await self._kube.get(self._ref)
            self._on_attempt(True)
            if lease is None:
                await self._kube.create(self._manifest({}), manager=self._identity)
            elif self._may_take(lease):
                await self._kube.replace(self._manifest(lease))
            else:
                return False
        except (ApiError, OSError, TimeoutError) as error:
            log.warning("lease not renewed: %s", error)
            self._on_attempt(isinstance(error, ApiError))
            return False
        # Two thirds: a request that was sent just before the end still lands before it.
        self._valid_until_s = started_s + self._duration_s * 2 / 3
        return True

    def _may_take(self, lease: dict[str, Any]) -> bool:
        spec = lease["spec"]
        if spec.get("holderIdentity") in (self._identity, "", None):
            return True
        renewal = (spec.get("holderIdentity"), spec.get("renewTime"))
        if renewal != self._seen:
            self._seen, self._seen_s = renewal, self._monotonic_s()
        patience_s = float(spec.get("leaseDurationSeconds", 0))
        return self._monotonic_s() - self._seen_s >= patience_s

    def _manifest(self, lease: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old = lease.get("spec", {})
        mine = old.get("holderIdentity") == self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._duration_s),
            "renewTime": now,
            "acquireTime": old.get("acquireTime", now) if mine else now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (0 if mine or not old else 1),
        }
        metadata = lease.get("metadata") or {
            "name": self._ref.name,
            "namespace": self._ref.namespace,
        }
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": spec,
        }
