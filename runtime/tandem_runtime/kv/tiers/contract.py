"""What a cache tier does, and who may call what when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple, Protocol, runtime_checkable

from tandem_runtime.kv.layout import Payload
from tandem_runtime.kv.tiers.policy import TierPolicy
from tandem_runtime.protocol import Named

Look = Callable[[bytes, memoryview, Named | None, int], tuple[list[bytes], list[bytes], int]]
"""Of a prompt's root and tokens, the named context that it begins with, and the size of pages: the
keys of its full blocks and of its full pages, and how many of its first tokens the accelerator
probably holds (`engine.prefixes.Prefixes.look`)."""


@dataclass(frozen=True)
class Page:
    """A full page of a prompt: canonical KV (kv/layout.py) and what it is the KV of."""

    key: bytes
    parent: bytes
    """Key of the page before; zeros for a first page."""
    tokens: bytes
    """Ids of the page's tokens (`prefix.token_bytes`), compared whenever it is loaded."""
    payload: Payload
    """Nobody writes to it once it is in a tier."""
    decoded: bool = False
    """Whose tokens, some of them, were generated: decode steps computed their KV. Where output is
    deterministic it is bit for bit what a prompt's would be."""


class Lent(NamedTuple):
    """A page as the accelerator has it."""

    payload: Payload
    decoded: bool
    """See `Page`."""


@dataclass
class Counters:
    """Of one tier since it was opened. Any thread may read."""

    loaded_pages: int = 0
    stored_pages: int = 0
    evicted_pages: int = 0
    available: bool = True
    """Whether the medium did what it was asked to do last."""
    failures: dict[str, int] = field(default_factory=dict)
    """Pages that could not be stored or loaded, by reason; they are recomputed."""

    def fail(self, reason: str) -> None:
        self.failures[reason] = self.failures.get(reason, 0) + 1


class Counted(Protocol):
    """A kind of place that pages come from."""

    name: str
    counters: Counters


class Source(Counted, Protocol):
    """A place that pages come from: a tier, or another pod."""

    def load(self, keys: Sequence[bytes], tokens: Sequence[bytes]) -> list[Page]:
        """The leading pages, checked, up to the first that is not here or not what it was. Raises
        nothing for what may happen on the way: that is counted.

        Args:
            keys: of successive pages.
            tokens: each page's (`Page.tokens`).
        """


class Tier(Source, Protocol):
    """A medium and its policy. Nothing here raises for what may happen to a medium: a page that
    cannot be stored or loaded is counted, forgotten by the policy, and computed again.

    One thread owns a tier and calls everything but `lookup`, which any thread may: its answer is
    a hint, and only `load` knows.
    """

    policy: TierPolicy

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading pages are probably here."""

    def use(self, tenant: str, keys: Sequence[bytes], *, goes_on: bool = False) -> list[int]:
        """A prompt of these full pages is being served, or with `goes_on` a stream has filled them
        behind its prompt. Gives up what the policy evicts.

        Returns:
            Places in `keys` of the pages that `store` is to be called with; `forget` for those that
            never come.
        """

    def store(self, page: Page) -> bool:
        """Keep a page that `use` asked for. Where it says False, the page is not here."""

    def forget(self, keys: Sequence[bytes]) -> None:
        """Pages that were to be stored and will not be."""

    def close(self) -> None:
        """Nothing is called afterwards."""


Told = Callable[[bytes, bool], None]
"""Takes a page's key, and whether it is here from now on, or no longer."""


@runtime_checkable
class Keeper(Tier, Protocol):
    """A tier that nobody else writes to: it can say what it holds, and promise to keep it.
    `Tier.policy`'s `unpin` ends the promise."""

    def tell(self, told: Told) -> None:
        """Tell of the pages that are here now, and of each that comes or goes from now on. Of one
        that goes without ever having been here, too."""

    def keep(self, tenant: str, keys: Sequence[bytes]) -> list[int] | None:
        """The same as `use`, and these pages stay; None where there is no room for them."""


def leading(pages: Iterable[Page | None]) -> list[Page]:
    """Those before the first that is None; later ones are not asked for."""
    return [p for p in takewhile(lambda p: p is not None, pages) if p is not None]
