"""Pages that a tier has promised to keep, by the name of whoever asked: a named context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_runtime.kv.tiers.contract import Keeper, Tier
from tandem_runtime.kv.tiers.policy import NOWHERE


@dataclass(frozen=True)
class Keep:
    """That a prompt's full pages are to stay in a tier until `TierCache.drop`."""

    name: str
    """Whose they are; the same name again replaces what it kept before."""
    tier: str


@dataclass(frozen=True)
class Kept:
    """What a tier keeps under a name."""

    pages: int
    stored: int
    """Of them; the others are still to come, or were lost."""
    held_pages: int
    """That the tier is bound to keep, whoever's they are."""
    capacity_pages: int
    refused: bool = False
    """There was no room; nothing is kept."""


class KeptPages:
    """Of a pod's own tiers; the thread of their jobs has it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tier, list[bytes]]] = {}
        """The names that were refused, too, without any pages."""

    def use(self, tier: Tier, tenant: str, keys: Sequence[bytes], keep: Keep | None) -> list[int]:
        """The same as `Tier.use`; of a tier that is to keep these pages, `Keeper.keep`."""
        if keep is None or keep.tier != tier.name or not isinstance(tier, Keeper):
            return tier.use(tenant, keys)
        self.drop(keep.name)
        wanted = tier.keep(tenant, keys)
        self._kept[keep.name] = (tier, [] if wanted is None else list(keys))
        return tier.use(tenant, keys) if wanted is None else wanted

    def drop(self, name: str) -> None:
        """The pages stay as long as they are worth it."""
        if name in self._kept:
            tier, keys = self._kept.pop(name)
            tier.policy.unpin(keys)

    def look(self, name: str) -> Kept | None:
        """What is kept under a name; None for one that asked for nothing, or has dropped it."""
        if name not in self._kept:
            return None
        tier, keys = self._kept[name]
        policy = tier.policy
        stored = sum(policy.place(key) != NOWHERE for key in keys)
        counts = policy.pinned_pages, policy.capacity_pages
        return Kept(len(keys), stored, *counts, refused=not keys)
