"""What a pod tells gateways of the pages that it holds (`contract.PATH_PAGES`)."""

from __future__ import annotations

import msgspec


class PageEvents(msgspec.Struct, frozen=True, omit_defaults=True):
    """Pages of prefixes (256 tokens) that a pod came to hold, or holds no more.

    A page on the accelerator is named by the prefix key of its last block, a page in tiers below by
    the key of the page (prefix.py).
    """

    log: str
    """Names the process's log."""
    seq: int
    """Number of the last change that is in here."""
    snapshot: bool = False
    """`gained` are all pages: forget what was known of the pod."""
    gained: bytes = b""
    """Keys of 16 bytes, one after the other."""
    lost: bytes = b""
    tiers_below: bool = False
    """The pod may find other pages in a tier of which this says nothing."""
    peer_percent: int = 0
    """What a page that another pod gives costs, of what computing it does; 0: it takes none."""

    def __post_init__(self) -> None:
        if len(self.gained) % 16 or len(self.lost) % 16:
            raise ValueError("page keys have 16 bytes each")
