"""Tenants' parts of a tier as people declare them, in percent, and what they are in pages.

A tenant is the value of the header `x-tandem-tenant`, letter for letter; `default` without one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from tandem_runtime.kv.tiers.policy import Share, TierPolicy

MOST: Final = 64
"""Tenants with a part of their own in one tier."""
_NAME: Final = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")
"""What every client can write into a header, and nothing that is stripped from it on the way."""
_PART: Final = re.compile(r"(\d*)\.\.(\d*):(.*)", re.DOTALL)


@dataclass(frozen=True)
class TenantPart:
    """Raises ValueError for what cannot be."""

    name: str
    floor_percent: int = 0
    """Of the tier's pages: kept for him against others, once he has filled them."""
    quota_percent: int | None = None
    """He never has more; 0: nothing of his is kept. None: no limit."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"the tenant {self.name!r} is none: write 1 to 256 printable ASCII characters, "
                "without a space at an end"
            )
        _check_percent(f"the floor of tenant {self.name}", self.floor_percent)
        _check_percent(f"the quota of tenant {self.name}", self.quota_percent)
        if self.quota_percent is not None and self.floor_percent > self.quota_percent:
            raise ValueError(
                f"tenant {self.name} has a floor of {self.floor_percent} % and a quota of "
                f"{self.quota_percent} %: lower the floor, or raise the quota"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """`FLOOR..QUOTA:NAME`; either number may be left out. Raises ValueError."""
        found = _PART.fullmatch(text)
        if found is None or found[1] == found[2] == "":
            raise ValueError(
                f"{text!r} is no tenant's part of a tier: write FLOOR..QUOTA:NAME in percent, "
                "such as 25..50:search, 25..:search or ..50:search"
            )
        floor, quota, name = found.groups()
        return cls(name, int(floor or 0), int(quota) if quota else None)


@dataclass(frozen=True)
class TenantParts:
    """Of one tier. Raises ValueError for what cannot be."""

    named: tuple[TenantPart, ...] = ()
    default_quota_percent: int | None = None
    """Of every tenant that is not named; None: no limit."""

    def __post_init__(self) -> None:
        names = [part.name for part in self.named]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tenant {twice} has two parts of one tier: give one")
        if len(names) > MOST:
            raise ValueError(f"{len(names)} tenants have parts of one tier: name at most {MOST}")
        floors = sum(part.floor_percent for part in self.named)
        if floors > 100:
            raise ValueError(f"the tenants' floors are {floors} % of the tier: lower them to 100")
        _check_percent("the default quota", self.default_quota_percent)

    @classmethod
    def parse(cls, parts: Sequence[str], default_quota_percent: int | None) -> Self:
        """From `TenantPart`'s texts. Raises ValueError."""
        return cls(tuple(map(TenantPart.parse, parts)), default_quota_percent)

    def __bool__(self) -> bool:
        return bool(self.named) or self.default_quota_percent is not None

    def policy(self, capacity_pages: int) -> TierPolicy:
        """Of a tier of so many pages; parts are rounded down.

        Raises ValueError where a part is less than a page, so that it would say nothing.
        """
        shares = {
            part.name: Share(
                _pages(part.floor_percent, capacity_pages, f"the floor of tenant {part.name}") or 0,
                _pages(part.quota_percent, capacity_pages, f"the quota of tenant {part.name}"),
            )
            for part in self.named
        }
        default = _pages(self.default_quota_percent, capacity_pages, "the default quota")
        return TierPolicy(capacity_pages, shares=shares, default_quota_pages=default)


def _check_percent(what: str, percent: int | None) -> None:
    if percent is not None and not 0 <= percent <= 100:
        raise ValueError(f"{what} is {percent} %: give 0 to 100")


def _pages(percent: int | None, capacity_pages: int, what: str) -> int | None:
    if percent is None:
        return None
    pages = capacity_pages * percent // 100
    if percent and not pages:
        raise ValueError(
            f"{what} is {percent} % of a tier that holds {capacity_pages} pages, which is less "
            "than a page: raise it, or make the tier larger"
        )
    return pages


NOBODY: Final = TenantParts()
