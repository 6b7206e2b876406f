"""Generated documents and questions to them, as SmolLM2's token ids."""

from __future__ import annotations

import random
from typing import Final

from tandem_runtime.config import EngineConfig
from tandem_runtime.frontend.tokenizer import Tokenizer
from tandem_runtime.serve.model import open_model, read_bundle

from benchmarks.fleet import MODEL_URI

DOCUMENT_TOKENS: Final = 4096
_NAMES: Final = ("Ada", "Bela", "Chidi", "Dora", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas")
_PLACES: Final = ("the mill", "the harbour", "the old bridge", "the archive", "the north tower")
_THINGS: Final = ("a ledger", "two lanterns", "a brass key", "the map", "nine letters", "a compass")
_VERBS: Final = ("left", "found", "hid", "copied", "sold", "repaired")


class Library:
    """Documents of exactly `DOCUMENT_TOKENS` tokens, and questions."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(read_bundle(open_model(EngineConfig(MODEL_URI))))

    def document(self, seed: int) -> list[int]:
        """The same seed gives the same document."""
        chance = random.Random(seed)
        ids: list[int] = []
        entry = 0
        while len(ids) < DOCUMENT_TOKENS:
            entry += 1
            text = (
                f"Entry {entry}. On day {chance.randrange(1, 366)} {chance.choice(_NAMES)} "
                f"{chance.choice(_VERBS)} {chance.choice(_THINGS)} at {chance.choice(_PLACES)}, "
                f"and {chance.choice(_NAMES)} paid {chance.randrange(2, 999)} crowns for it.\n"
            )
            ids += self._tokenizer.encode(text, add_special_tokens=False)
        return ids[:DOCUMENT_TOKENS]

    def question(self, number: int) -> list[int]:
        """About twenty tokens."""
        chance = random.Random(f"question {number}")
        text = (
            f"\nQuestion {number}: what did {chance.choice(_NAMES)} do at {chance.choice(_PLACES)}?"
            "\nAnswer:"
        )
        return self._tokenizer.encode(text, add_special_tokens=False)
