"""How likely a page is to be used again soon, learned from how pages like it were used. Pure.

Pages are sorted into *classes* by what is known when they are used; for each class the hazard of
reuse is counted by age (in prompts served since the last use, in buckets that widen). A page's
*worth* is then the best hits per prompt of keeping it that any length of keeping it promises: the
Gittins index of its class and age, max over n of P(reuse within n) / E[time kept until then]. With
one class, worth falls with age, and evicting the least worth is LRU.

What was evicted is remembered for a while, so that its reuse counts, too: otherwise a class that is
always evicted before its reuse would look as if it were never reused.
"""

from __future__ import annotations

import math
from typing import Final

_STEP: Final = 1.6
AGES: Final = 24
"""Buckets of ages; the last one ends at 80,000 prompts."""
_STARTS: Final = [_STEP**i - 1 for i in range(AGES + 1)]
_WIDTHS: Final = [_STEP ** (i + 1) - _STEP**i for i in range(AGES)]

REUSED: Final = 0
"""Found again at least once."""
TAIL: Final = 1
"""New, behind pages that were known: a question to a known document, an answer's end."""
_NEW: Final = 2
CLASSES: Final = 28
"""The others: of a prompt that began with nothing known, by its length (two for each doubling)."""

_FORGET: Final = 0.9975
"""What is left of old counts at each refresh."""
_PRIOR: Final = 50.0
"""Weight of what all classes do at an age, in page-prompts for each prompt of age."""
_REFRESH_PROMPTS: Final = 50
_FIRST_GUESS: Final = 1.0
"""Worth of a page just used, before anything is known."""


def page_class(*, used_before: bool, known_prefix: bool, prompt_pages: int) -> int:
    if used_before:
        return REUSED
    if known_prefix:
        return TAIL
    return min(_NEW + int(2 * math.log2(prompt_pages)), CLASSES - 1)


def age_bucket(age: int) -> int:
    return min(int(math.log(age + 1) / math.log(_STEP)), AGES - 1)


class Reuse:
    """What is known of one tenant's pages. Nobody else's change it."""

    def __init__(self) -> None:
        self.worth = [
            [_FIRST_GUESS / (1 + start) for start in _STARTS[:-1]] for _ in range(CLASSES)
        ]
        """By class and age. Before anything is known: the older, the less."""
        self._prompts = 0
        self._reuses = [[0.0] * AGES for _ in range(CLASSES)]
        self._kept = [[0.0] * AGES for _ in range(CLASSES)]
        """Page-prompts without a reuse."""
        self._alive: dict[tuple[int, int], int] = {}
        """Pages that may still be reused, by class and the prompt of their last use."""

    def served(self, now: int) -> None:
        """One more prompt of the tenant; from time to time `worth` is calculated anew."""
        self._prompts += 1
        if self._prompts % _REFRESH_PROMPTS == 0:
            self.worth = [_worth(hazards) for hazards in self._hazards(now)]

    def used(self, page_class: int, now: int) -> None:
        """A page joins this class."""
        key = (page_class, now)
        self._alive[key] = self._alive.get(key, 0) + 1

    def ended(self, page_class: int, last: int, now: int, *, reused: bool) -> None:
        """A page of this class, last used then, is used again, or is forgotten."""
        key = (page_class, last)
        self._alive[key] -= 1
        if not self._alive[key]:
            del self._alive[key]
        self._reuses[page_class][age_bucket(now - last)] += reused
        _expose(self._kept[page_class], now - last + 0.5, 1)

    def _hazards(self, now: int) -> list[list[float]]:
        """Reuses a page and prompt, by class and age; old counts fade."""
        kept = [list(of_class) for of_class in self._kept]
        for (page_class, last), pages in self._alive.items():
            _expose(kept[page_class], now - last + 0.5, pages)
        prior = [
            sum(c[age] for c in self._reuses) / (sum(c[age] for c in kept) or 1.0)
            for age in range(AGES)
        ]
        found = [
            [
                (reuses[age] + _PRIOR * width * prior[age]) / (exposed[age] + _PRIOR * width)
                for age, width in enumerate(_WIDTHS)
            ]
            for reuses, exposed in zip(self._reuses, kept, strict=True)
        ]
        for counts in (*self._reuses, *self._kept):
            for age in range(AGES):
                counts[age] *= _FORGET
        return found


def _expose(kept: list[float], age: float, pages: int) -> None:
    """`pages` were kept from age 0 to `age`."""
    last = age_bucket(int(age))
    for bucket in range(last):
        kept[bucket] += pages * _WIDTHS[bucket]
    kept[last] += pages * (age - _STARTS[last])


def _worth(hazards: list[float]) -> list[float]:
    """The Gittins index by age, from a class's hazards."""
    chances = [1 - math.exp(-h * w) for h, w in zip(hazards, _WIDTHS, strict=True)]
    times = [c / h if h > 0 else w for c, h, w in zip(chances, hazards, _WIDTHS, strict=True)]
    found = []
    for age in range(AGES):
        left, hits, time, best = 1.0, 0.0, 0.0, 0.0
        for later in range(age, AGES):
            hits += left * chances[later]
            time += left * times[later]
            left *= 1 - chances[later]
            best = max(best, hits / time)
        found.append(best)
    return found
