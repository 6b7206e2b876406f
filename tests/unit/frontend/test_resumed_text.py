"""Text that goes on in another process: whatever the cut, what came and what comes is the text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from small_vocabulary import byte_bundle
from tandem_runtime.frontend.backend import ModelCard, Route, ServedModel
from tandem_runtime.frontend.generation import Generation, Piece, run
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.protocol import GenerateEvent, GenerateRequest, Sampling

MODEL = ServedModel.of(ModelCard("m", "f", 0), byte_bundle())
BYTE_IDS = {MODEL.tokenizer.token_bytes(n)[0]: n for n in range(256)}
TEXTS = st.text("aé東👩‍🚀 <>", max_size=24)
BYTES = st.binary(max_size=40)


class Played:
    """Ids in events of given lengths."""

    def __init__(self, ids: list[int], cuts: list[int]) -> None:
        borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
        self._parts = [ids[a:b] for a, b in pairwise(borders)] or [[]]

    async def generate(
        self, model: ServedModel, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[GenerateEvent, None]:
        for n, part in enumerate(self._parts):
            finish = "length" if n + 1 == len(self._parts) else None
            yield GenerateEvent(0, token_ids=tuple(part), finish_reason=finish)


def pieces_of(
    ids: list[int], cuts: list[int], stop: tuple[str, ...], sent_tokens: int = 0
) -> list[Piece]:
    generation = Generation(
        MODEL, [1], Sampling(max_tokens=99), stop, "t", "", sent_tokens=sent_tokens
    )
    record = StreamRecord("m", "f", 0.0)
    played = Played(ids, cuts)

    async def collect() -> list[Piece]:
        return [piece async for piece in run(played, generation, record, lambda _: None)]

    return asyncio.run(collect())


@given(
    data=st.one_of(TEXTS.map(str.encode), BYTES),
    stop=st.lists(st.text("aé東<> ", min_size=1, max_size=4), max_size=2).map(tuple),
    cuts=st.tuples(st.lists(st.integers(0, 99)), st.lists(st.integers(0, 99))),
)
def test_every_cut(data: bytes, stop: tuple[str, ...], cuts: tuple[list[int], list[int]]) -> None:
    ids = [BYTE_IDS[byte] for byte in data]
    first = pieces_of(ids, cuts[0], stop)
    text = "".join(piece.text for piece in first)
    for n, last in enumerate(first[:-1]):
        before = "".join(piece.text for piece in first[: n + 1])
        after = [
            piece
            for piece in pieces_of(ids, cuts[1], stop, last.tokens)
            if piece.tokens > last.tokens or piece.finish_reason is not None
        ]
        assert before + "".join(piece.text for piece in after) == text
        assert after[-1].finish_reason == first[-1].finish_reason
