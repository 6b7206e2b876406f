"""How much work pods have, as far as this gateway knows. Pure.

Its own streams it knows exactly. Those of other gateways it learns from the pods' state, which it
reads every few seconds: streams that a pod has beyond ours count at a typical size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

FOREIGN_STREAM_TOKENS: Final = 512


class Loads:
    """By pod uid."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._foreign_streams: Counter[str] = Counter()

    def begin(self, uid: str, tokens: int) -> None:
        self._streams[uid] += 1
        self._tokens[uid] += tokens

    def end(self, uid: str, tokens: int) -> None:
        """With the same number as at the beginning."""
        self._streams[uid] -= 1
        self._tokens[uid] -= tokens

    def streams(self, uid: str) -> int:
        """Streams of ours on the pod."""
        return self._streams[uid]

    def observe(self, uid: str, streams: int, ours: int) -> None:
        """A pod says how many streams it has, all gateways' together.

        `ours`: how many we had when we asked. Some may have ended meanwhile, others begun; neither
        may be taken for somebody else's.
        """
        self._foreign_streams[uid] = max(0, streams - max(ours, self._streams[uid]))

    def keep(self, uids: Iterable[str]) -> None:
        """Forgets pods that are gone and have no streams of ours left."""
        known = set(uids)
        for uid in list(self._foreign_streams):
            if uid not in known:
                del self._foreign_streams[uid]
        for uid in list(self._streams):
            if uid not in known and not self._streams[uid]:
                del self._streams[uid], self._tokens[uid]

    def outstanding_tokens(self) -> dict[str, int]:
        uids = {*self._tokens, *self._foreign_streams}
        return {
            uid: self._tokens[uid] + FOREIGN_STREAM_TOKENS * self._foreign_streams[uid]
            for uid in uids
        }
