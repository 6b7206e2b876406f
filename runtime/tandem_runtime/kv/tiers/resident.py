"""What the pod's own tiers have in common: pages that a policy chooses, and who is told of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tandem_runtime.kv.tiers.contract import Counters, Page, Told, leading
from tandem_runtime.kv.tiers.policy import Decision, TierPolicy


class ResidentTier(ABC):
    """The part of `contract.Keeper` that knows nothing of the medium."""

    def __init__(self, policy: TierPolicy) -> None:
        self.policy = policy
        self.counters = Counters()
        self._told: Told = lambda key, here: None

    def lookup(self, keys: Sequence[bytes]) -> int:
        return self.policy.lookup(keys)

    def use(self, tenant: str, keys: Sequence[bytes], *, goes_on: bool = False) -> list[int]:
        return self._follow(self.policy.use(tenant, keys, goes_on=goes_on))

    def keep(self, tenant: str, keys: Sequence[bytes]) -> list[int] | None:
        decision = self.policy.keep(tenant, keys)
        return None if decision is None else self._follow(decision)

    def load(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
        return leading(map(self._load, keys, tokens))

    def _follow(self, decision: Decision) -> list[int]:
        for place in decision.evicted_places:
            self._left(place)
        for key in decision.evict:
            self._told(key, False)
        self.counters.evicted_pages += len(decision.evict)
        return list(decision.store)

    @abstractmethod
    def _left(self, place: int) -> None:
        """The page at this place of the medium is not needed any more."""

    @abstractmethod
    def _load(self, key: bytes, tokens: bytes) -> Page | None:
        """One page, if it is here and what it was."""
