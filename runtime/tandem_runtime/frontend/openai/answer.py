"""One answer of the OpenAI protocol: its choices' streams, as chunks or as one body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from starlette.responses import Response

from tandem_runtime import contract
from tandem_runtime.frontend.errors import ApiError
from tandem_runtime.frontend.generation import Piece
from tandem_runtime.frontend.openai.position import Position
from tandem_runtime.frontend.openai.reply import Envelope, Json, Shape
from tandem_runtime.frontend.record import StreamRecord
from tandem_runtime.frontend.respond import Event, EventStream

_DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Choice:
    index: int
    pieces: AsyncGenerator[Piece, None]
    record: StreamRecord
    shape: Shape
    after: Choice | None = None
    """The first choice of the same prompt: it waits for its first piece, and finds the prompt in
    the prefix cache then."""
    began: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Answer:
    envelope: Envelope
    choices: Sequence[Choice]
    traced: bool
    """Whether the end carries the `tandem` object (of the first choice)."""
    position: Position | None = None
    """What the client has, if another gateway can go on with the answer when this one is lost."""

    def stream(self, *, include_usage: bool) -> Response:
        """Server-sent events."""
        named = {} if self.position is None else {contract.HEADER_STREAM: self.envelope.id}
        chunks = self.chunks(include_usage=include_usage)
        return EventStream(chunks, ApiError.openai, last=_DONE, headers=named)

    async def chunks(self, *, include_usage: bool) -> AsyncGenerator[object, None]:
        position = self.position or Position.start(len(self.choices))

        def event(chunk: Json) -> object:
            return chunk if self.position is None else Event(chunk, str(position))

        async with aclosing(merged(self.choices)) as pieces:
            async for choice, piece in pieces:
                part = choice.shape.part(choice.index, piece)
                if not position.take(choice.index, piece):
                    continue
                chunk = self.envelope.chunk([part])
                if include_usage:
                    chunk["usage"] = None
                yield event(chunk if position.unfinished or include_usage else self._last(chunk))
        if include_usage and not position.ended:
            position.ended = True
            yield event(self._last({**self.envelope.chunk([]), "usage": self._usage()}))

    async def body(self) -> Json:
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        async with aclosing(merged(self.choices)) as stream:
            async for choice, piece in stream:
                pieces[choice.index].append(piece)
        wholes = [
            choice.shape.whole(choice.index, joined(pieces[choice.index]))
            for choice in self.choices
        ]
        return self._last({**self.envelope.body(wholes), "usage": self._usage()})

    def _usage(self) -> Json:
        # A prompt counts once, however many choices it has.
        prompts = [choice.record for choice in self.choices if choice.after is None]
        prompt = sum(record.prompt_tokens for record in prompts)
        cached = sum(record.cached_tokens for record in prompts)
        completion = sum(
            choice.record.completion_tokens + choice.record.replayed_tokens
            for choice in self.choices
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _last(self, body: Json) -> Json:
        return {**body, "tandem": self.choices[0].record.trace()} if self.traced else body


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a stream as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=pieces[-1].tokens,
        token_ids=tuple(i for piece in pieces for i in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        top_logprobs=tuple(entry for piece in pieces for entry in piece.top_logprobs),
        finish_reason=pieces[-1].finish_reason,
    )


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices as they come. The first failure ends all of them."""
    if len(choices) == 1:
        async with aclosing(choices[0].pieces) as pieces:
            async for piece in pieces:
                yield choices[0], piece
        return
    queue: asyncio.Queue[tuple[Choice, Piece] | Exception | None] = asyncio.Queue(len(choices))

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(choice.pieces) as pieces:
                if choice.after is not None:
                    await choice.after.began.wait()
                async for piece in pieces:
                    choice.began.set()
                    await queue.put((choice, piece))
            await queue.put(None)
        except Exception as failure:
            await queue.put(failure)

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
