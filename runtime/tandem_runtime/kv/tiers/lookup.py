"""A prompt on its way through the cache tiers, and what the engine is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem_runtime.kv.tiers.contract import Look, Page
from tandem_runtime.kv.tiers.kept import Keep
from tandem_runtime.prefix import KEY_BYTES
from tandem_runtime.protocol import Named, PrefillTarget


@dataclass
class Fetched:
    """What the tiers have for a prompt, and want of it."""

    arrival: int
    """Which prompt of the engine's it was."""
    block_keys: list[bytes] = field(default_factory=list)
    """Of the prompt's full blocks, as the accelerator's cache has them."""
    first_page: int = 0
    pages: list[Page] = field(default_factory=list)
    """Successive ones from `first_page` on."""
    tiers: list[str] = field(default_factory=list)
    """Where each came from."""
    tenant: str = ""
    keys: list[bytes] = field(default_factory=list)
    """Of the prompt's full pages."""
    wanted: set[int] = field(default_factory=set)
    """Pages that a tier is to be given when they are computed."""
    wanted_remotely: set[int] = field(default_factory=set)
    """Those of them that the remote tier is to be given, too."""

    def pages_from(self, page: int) -> list[Page]:
        """Successive ones from this one on; none if it is not among them."""
        return self.pages[page - self.first_page :] if page >= self.first_page else []


@dataclass
class Lookup:
    """A prompt on its way through the tiers. One thread after the other has it, but `others`, which
    those of peers and the remote tier fill, and `settled`, which they read."""

    fetched: Fetched
    root: bytes
    """Of the prompt's keys."""
    token_ids: Sequence[int]
    look: Look
    """What the accelerator has of it."""
    page_tokens: int
    keep: Keep | None = None
    holder: PrefillTarget | None = None
    """A pod that says it has pages of the prompt."""
    begins: Named | None = None
    """The named context that it begins with."""
    tokens: memoryview = field(default_factory=lambda: memoryview(b""))
    """The ids, as they are compared."""
    until_s: float = 0.0
    """On `time.monotonic`: by then what is asked of others would have been computed."""
    local: list[Page] = field(default_factory=list)
    others: list[tuple[str, Page]] = field(default_factory=list)
    """The pages that follow, and where from."""
    wanted_remotely: list[int] = field(default_factory=list)
    settled: bool = False
    """The prompt has gone on; what comes later comes too late."""

    @property
    def most_pages(self) -> int:
        """The last known token is always computed: its logits give the next one."""
        return (len(self.tokens) // 4 - 1) // self.page_tokens

    def next_page(self) -> int:
        """The first that is still to be loaded."""
        return self.fetched.first_page + len(self.local) + len(self.others)

    def tokens_of(self, page: int) -> bytes:
        size = 4 * self.page_tokens
        return bytes(self.tokens[page * size : (page + 1) * size])

    def span(self, first: int, end: int) -> tuple[list[bytes], list[bytes]]:
        """Keys and tokens of some pages."""
        return self.fetched.keys[first:end], [self.tokens_of(page) for page in range(first, end)]

    def loaded(self, page: int) -> Page | None:
        """A page that was loaded before the prompt went on."""
        place, keys = page - self.fetched.first_page, self.fetched.keys
        if not 0 <= place < len(self.local):
            return None
        parent = keys[page - 1] if page else bytes(KEY_BYTES)
        came = self.local[place]
        return Page(keys[page], parent, self.tokens_of(page), came.payload, came.decoded)
